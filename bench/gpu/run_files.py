"""A training run's checkpoint in small files: made smaller where it must be, split, joined, turned into a codec.

python -m bench.gpu.run_files export runs/smollm2 out/
python -m bench.gpu.run_files join out/checkpoint.pt.parts.json runs/smollm2
python -m bench.gpu.run_files codec runs/smollm2/checkpoint.pt ztok_fast/models/ztok-smollm2-135m
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from ztok_fast.codec.config import ZTokConfig
from bench.gpu.file_parts import MANIFEST_SUFFIX, FilePartsError, join_file, split_file
from ztok_fast.codec.weights import save_weights
from ztok_fast.train.loop import CHECKPOINT, METRICS

KEEP = ("everything", "half-moments", "weights", "half-weights")
"""What an exported checkpoint keeps, from most to least: all; the optimiser's moments as bfloat16; no moments
(Adam starts anew); no moments and the codec's weights as bfloat16."""

PART_BYTES = 16_000_000
CHECKPOINT_BYTES = 60_000_000


def slim(state: dict, keep: str) -> dict:
    """A copy of a checkpoint that holds what ``keep`` (one of :data:`KEEP`) says; the trainer resumes from any."""
    if keep not in KEEP:
        raise ValueError(f"keep: expected one of {KEEP}, got {keep!r}")
    state = dict(state)
    optimizer = state["optimizer"]
    if keep == "half-moments":
        moments = {
            index: {name: _half(value) if name.startswith("exp_avg") else value for name, value in own.items()}
            for index, own in optimizer["state"].items()
        }
        state["optimizer"] = {**optimizer, "state": moments}
    elif keep in ("weights", "half-weights"):
        # The groups stay: the optimiser checks them when it loads, and starts its moments anew.
        state["optimizer"] = {**optimizer, "state": {}}
    if keep == "half-weights":
        state["codec"] = {name: _half(value) for name, value in state["codec"].items()}
    return state


def _half(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.bfloat16)


def export_run(
    run: str | Path, out: str | Path, keep: str = "auto", part_bytes: int = PART_BYTES, limit: int = CHECKPOINT_BYTES
) -> str:
    """Write a run's checkpoint and metrics as files of at most ``part_bytes``; returns what was kept.

    Args:
        run: folder of the training run; out: folder to write to.
        keep: one of :data:`KEEP`, or ``"auto"`` for the most that stays within ``limit`` bytes.

    Raises:
        FilePartsError: the run has no checkpoint, or none of the forms is small enough.
    """
    run, out = Path(run), Path(out)
    if not (run / CHECKPOINT).is_file():
        raise FilePartsError(f"run {run}: expected a {CHECKPOINT} in it, got none")
    out.mkdir(parents=True, exist_ok=True)
    state = torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True)
    with tempfile.TemporaryDirectory() as folder:
        slimmed = Path(folder) / CHECKPOINT
        for form in KEEP if keep == "auto" else (keep,):
            torch.save(slim(state, form), slimmed)
            if keep != "auto" or slimmed.stat().st_size <= limit:
                split_file(slimmed, out, part_bytes)
                break
        else:
            raise FilePartsError(
                f"checkpoint of {run}: expected at most {limit} bytes as {KEEP[-1]}, got {slimmed.stat().st_size}"
            )
    if (run / METRICS).is_file():
        if (run / METRICS).stat().st_size <= part_bytes:
            shutil.copyfile(run / METRICS, out / METRICS)
        else:
            split_file(run / METRICS, out, part_bytes)
    return form


def restore_run(checkpoint: str | Path, run: str | Path) -> None:
    """Put a checkpoint, whole or as the manifest of its parts, and the metrics beside it, into a run's folder."""
    checkpoint, run = Path(checkpoint), Path(run)
    run.mkdir(parents=True, exist_ok=True)
    _place(checkpoint, run / CHECKPOINT)
    for metrics in (checkpoint.parent / METRICS, checkpoint.parent / (METRICS + MANIFEST_SUFFIX)):
        if metrics.is_file():
            _place(metrics, run / METRICS)


def _place(source: Path, target: Path) -> None:
    if source.name.endswith(MANIFEST_SUFFIX):
        join_file(source, target)
    elif not source.is_file():
        raise FilePartsError(f"checkpoint: expected an existing file or {MANIFEST_SUFFIX} manifest, got {source}")
    elif source.resolve() != target.resolve():
        shutil.copyfile(source, target)


def write_codec(checkpoint: str | Path, folder: str | Path) -> None:
    """Write the codec of a checkpoint, as bfloat16, without its base model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / CHECKPOINT
        _place(Path(checkpoint), whole)
        state = torch.load(whole, map_location="cpu", weights_only=True)
    save_weights(folder, state["codec"], torch.bfloat16)
    ZTokConfig.from_dict(state["config"]).save(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.run_files", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a run's checkpoint and metrics as small files")
    export.add_argument("run")
    export.add_argument("out")
    export.add_argument("--keep", default="auto", choices=("auto", *KEEP))
    join = commands.add_parser("join", help="put an exported checkpoint into a run's folder")
    join.add_argument("checkpoint", help=f"{CHECKPOINT}, or the {MANIFEST_SUFFIX} manifest of its parts")
    join.add_argument("run")
    codec = commands.add_parser("codec", help="write the codec of a checkpoint")
    codec.add_argument("checkpoint", help=f"{CHECKPOINT}, or the {MANIFEST_SUFFIX} manifest of its parts")
    codec.add_argument("folder")
    options = parser.parse_args(argv)
    try:
        if options.command == "export":
            print(f"kept: {export_run(options.run, options.out, options.keep)}")
        elif options.command == "join":
            restore_run(options.checkpoint, options.run)
        else:
            write_codec(options.checkpoint, options.folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
