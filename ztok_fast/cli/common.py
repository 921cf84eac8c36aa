"""What the commands share: plain errors, reading and writing, loading a codec, the progress bar."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec
    from ztok_fast.codec.zbatch import ZBatch

DEFAULT_CODEC = "ztok-mini"
MISTAKE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # the last two as a shell reports the signals
BAR_DELAY_SECONDS = 1.0


class UsageError(ValueError):
    """The command cannot do what it was asked to do."""


# Errors


def run_plainly(command: Callable[[], int], traceback: bool = False) -> int:
    """Run a command; errors that a user can mend become one line on stderr and an exit status.

    Those are ``OSError`` and the ``ValueError`` of this package. Anything else is a defect and keeps its traceback.
    """
    try:
        with quiet_libraries():
            status = command()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("ztok: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone. Python would flush stdout once more on exit, and fail again.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
        return BROKEN_PIPE
    except OSError as error:
        if traceback:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _mistake(f"{where}{error.strerror or error}")
    except (ValueError, FloatingPointError) as error:
        if traceback or not _raised_here(error):
            raise
        return _mistake(str(error))


def _mistake(message: str) -> int:
    sys.stdout.flush()
    print(f"ztok: error: {message}", file=sys.stderr)
    return MISTAKE


def _raised_here(error: Exception) -> bool:
    """Whether the line that raised ``error`` is in this package, not in a library that choked on something."""
    step = error.__traceback__
    while step.tb_next is not None:
        step = step.tb_next
    return step.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "ztok_fast"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep libraries' warnings to their own developers (deprecations above all) from the user of a command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|accelerate|huggingface_hub)(\.|$)")
        yield


# Files


def check_input(path: str) -> Path:
    """The path of a file to read, or :class:`UsageError` when there is none."""
    if Path(path).is_dir():
        raise UsageError(f"{path}: expected a file, got a folder")
    if not Path(path).exists():
        raise UsageError(f"{path}: there is no such file")
    return Path(path)


def read_bytes(path: str) -> bytes:
    """A file's bytes, or those of stdin for ``-``."""
    return sys.stdin.buffer.read() if path == "-" else check_input(path).read_bytes()


def check_output(path: str | Path, suffix: str | None = None) -> Path:
    """The path of a file to write, refused before any work is done where it cannot be written."""
    path = Path(path)
    if suffix and path.suffix != suffix:
        raise UsageError(f"output {path}: expected a file name that ends in {suffix}")
    if path.is_dir():
        raise UsageError(f"output {path}: expected a file name, got a folder")
    check_parent(path)
    return path


def check_parent(path: Path) -> None:
    """Raise :class:`UsageError` unless ``path`` can be made: its nearest existing parent is a writable folder."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"output {path}: cannot be written, {folder} is not a folder that files can be made in")


def write_stdout(data: bytes) -> None:
    """Write bytes as they are: a decompressed text need not be UTF-8."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def load_batch(path: str) -> ZBatch:
    check_input(path)
    from ztok_fast.codec.zbatch import ZBatch

    return ZBatch.load(path)


# Codec


def add_codec_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--codec", default=DEFAULT_CODEC, metavar="NAME|FOLDER", help=f"codec to use (default {DEFAULT_CODEC})"
    )
    parser.add_argument(
        "--base", metavar="NAME|FOLDER", help="base model to use in place of the one that the codec names"
    )
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where to compute; exact files want the same one again"
    )


def load_codec(options: argparse.Namespace) -> ZTokCodec:
    import torch

    from ztok_fast.codec.codec import ZTokCodec

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device can be used here; `ztok doctor` says why")
    return ZTokCodec.from_pretrained(options.codec, base=options.base).to(options.device)


def tokenize(codec: ZTokCodec, texts: list[str]) -> list[list[int]]:
    """Text tokens as the codec sees them."""
    return codec.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


# Progress


def shows_progress() -> bool:
    return sys.stderr.isatty()


@contextmanager
def progress_bar(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, on a terminal and once the work has taken a second; yields its ``update``."""
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=description,
        unit=" tokens",
        unit_scale=True,
        delay=BAR_DELAY_SECONDS,
        leave=False,
        file=sys.stderr,
        disable=not shows_progress(),
    ) as bar:
        yield bar.update
