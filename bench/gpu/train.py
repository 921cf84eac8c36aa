"""One bounded training run on a machine without a network: join the base, resume, train, export, evaluate.

Started by ``bench/gpu/train.sh``, which documents the options.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import zipfile
from pathlib import Path

NEEDED = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy", "yaml", "tqdm")
EVALUATION = "evaluation.json"


class RunError(ValueError):
    """The run cannot be made as asked; the message says what is missing."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: packages not found: {', '.join(missing)}; give a folder with their wheels as --wheels",
            file=sys.stderr,
        )
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="ztok-gpu-train-") as scratch:
            print(dry_run(options, Path(scratch), argv) if options.dry else one_run(options, Path(scratch), argv))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu/train.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/smollm2_gpu.yaml", help="training settings")
    parser.add_argument("--checkpoint", help="checkpoint.pt or its .parts.json to go on from; without it, from step 0")
    parser.add_argument(
        "--base-parts", metavar="MANIFEST", help=".parts.json of a .whl, .gguf or .zip with the base model"
    )
    parser.add_argument("--train-files", nargs="+", help="instead of those of the settings")
    parser.add_argument("--dev-files", nargs="+", help="instead of those of the settings")
    parser.add_argument("--out", default=os.environ.get("OUT"), help="folder for the results (default $OUT)")
    parser.add_argument("--minutes", type=float, default=9.0, help="wall-clock time of the whole run (default 9)")
    parser.add_argument("--reserve", type=float, default=1.5, help="minutes of it kept for export and evaluation")
    parser.add_argument("--keep", default="auto", help="what the checkpoint keeps: see bench/gpu/run_files.py")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="instead of the settings' choice")
    parser.add_argument("--dry", action="store_true", help="the same path on a tiny random base, three steps")
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.out:
        parser.error("--out: expected a folder for the results (or $OUT), got none")
    if not 0 <= options.reserve < options.minutes:
        parser.error(f"--reserve: expected less than --minutes {options.minutes:g}, got {options.reserve:g}")
    return options


def one_run(options: argparse.Namespace, scratch: Path, argv: list[str]) -> str:
    """Make the run of ``options``; returns the report that is printed last."""
    import torch

    from bench.environment import environment
    from bench.gpu.run_files import export_run, restore_run
    from ztok_fast.train.loop import METRICS, Trainer
    from ztok_fast.train.settings import TrainSettings

    settings = TrainSettings.load(options.config)
    run, out = scratch / "run", Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    changes: dict = {"out": str(run)}
    for name in ("train_files", "dev_files", "compile"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    if not options.dry:
        changes["eval_every"] = 0  # the one evaluation comes last, when the checkpoint is safe
    if options.checkpoint:
        restore_run(options.checkpoint, run)
    else:
        print("no --checkpoint: training starts at step 0", flush=True)
    settings = dataclasses.replace(settings, **changes)
    base = load_parts(options.base_parts, settings.base, scratch) if options.base_parts else None
    trainer = Trainer(settings, base=base)
    first = trainer.step
    left = options.minutes - options.reserve - (time.time() - options.started) / 60
    if left <= 0:
        raise RunError(f"--minutes: expected time left for training, got none after {options.minutes:g} minutes' setup")
    trainer.settings = dataclasses.replace(settings, max_minutes=left)
    print(f"{_device(torch)}: from step {first} of {settings.steps}, {left:.1f} minutes of training", flush=True)
    trainer.run()
    kept = export_run(run, out, options.keep)
    report = trainer.evaluate()
    facts = {
        "environment": environment("bench.gpu.train", argv),
        "first_step": first,
        "step": trainer.step,
        "kept": kept,
        "evaluation": report,
    }
    (out / EVALUATION).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    rows = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    return summary(report, [row for row in rows if row["step"] > first], first, trainer.step, kept, out)


def load_parts(manifest: str, name: str, scratch: Path):
    """The base model whose file was split: joined, checked against its SHA-256, converted and loaded.

    Args:
        manifest: ``.parts.json`` of a wheel or GGUF file, or of a zip of a folder in Hugging Face format.
        name: what the base model is called in the codec's settings, whatever file it came in.
    """
    from ztok_fast.codec.base_model import load_base
    from bench.gpu.file_parts import join_file

    whole = join_file(manifest, scratch)
    if whole.suffix == ".zip":
        with zipfile.ZipFile(whole) as archive:
            archive.extractall(scratch / "base")
        whole = scratch / "base"
    elif importlib.util.find_spec("gguf") is None:
        raise RunError(
            f"--base-parts {manifest}: reading it needs the package gguf; give its wheel's folder as --wheels"
        )
    return dataclasses.replace(load_base(str(whole)), name=name)


def summary(report: dict, rows: list[dict], first: int, last: int, kept: str, out: Path) -> str:
    """The table and the facts under it."""
    from bench.tables import number, percent, table

    lines = []
    if report:
        base = report["base"]
        lines.append(
            table(
                ["budget", "teacher-forced", "free-running", "ratio", "rate, bits/token", "text's own, bits/token"],
                [
                    [
                        name,
                        percent(r["teacher_forced"]),
                        percent(r["free_running"]),
                        number(r["ratio"]),
                        number(r["rate"]),
                        number(base["bits_per_token"]),
                    ]
                    for name, r in report.items()
                    if name != "base"
                ],
            )
        )
        lines.append(
            f"without Z-tokens the base model guesses {percent(base['accuracy'])} of the tokens, true prefix given"
        )
    lines.append(f"steps {first} to {last}; checkpoint kept: {kept}")
    if rows:
        speed = statistics.median(row["tokens_per_second"] for row in rows)
        lines.append(f"reconstruction loss {rows[-1]['reconstruction']:.3f}, median {speed:,.0f} text tokens/s")
    files = sorted(path for path in out.rglob("*") if path.is_file())
    lines += [f"{path.relative_to(out)}: {path.stat().st_size:,} bytes" for path in files]
    return "\n".join(lines)


def dry_run(options: argparse.Namespace, scratch: Path, argv: list[str]) -> str:
    """Two short runs on a tiny random base that comes in two halves; the second resumes the exported first."""
    import yaml

    from bench.tiny import CODEC, write_texts, write_tiny_base
    from bench.gpu.file_parts import split_file
    from ztok_fast.train.loop import CHECKPOINT

    texts = write_texts(scratch / "texts.jsonl")
    folder = write_tiny_base(scratch / "tiny", texts)
    packed = scratch / "tiny.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    manifest = split_file(packed, scratch / "halves", -(-packed.stat().st_size // 2))
    settings = {
        "base": "tiny",
        "out": "unused",
        "train_files": [str(texts)],
        "dev_files": [str(texts)],
        "codec": CODEC,
        "batch_tokens": 256,
        "chunk_tokens": 64,
        "continuous_steps": 1,
        "blend_steps": 1,
        "surprisal_steps": 1,
        "sampling_start": 0.5,
        "sampling_every": 1,
        "warmup_steps": 1,
        "eval_documents": 2,
        "eval_tokens": 32,
        "kmeans_latents": 64,
        "threads": 1,
    }
    exported = scratch / "first"
    runs = ((2, None, exported), (3, exported / f"{CHECKPOINT}.parts.json", Path(options.out)))
    for steps, checkpoint, out in runs:
        config = scratch / f"settings-{steps}.yaml"
        config.write_text(yaml.safe_dump({**settings, "steps": steps}), encoding="utf-8")
        own = scratch / f"run-{steps}"
        own.mkdir()
        changed = {
            **vars(options),
            "config": str(config),
            "base_parts": str(manifest),
            "out": str(out),
            "checkpoint": checkpoint and str(checkpoint),
            "train_files": None,
            "dev_files": None,
        }
        report = one_run(argparse.Namespace(**changed), own, argv)
    return report


def _device(torch) -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    raise SystemExit(main())
