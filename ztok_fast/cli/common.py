"""Helpers of all commands: errors as messages, input and output files, loading a codec, the progress bar."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ztok_fast.cli import streams
from ztok_fast.codec.errors import LossyTextWarning

if TYPE_CHECKING:
    from ztok_fast.codec.base_model import BaseModel
    from ztok_fast.codec.codec import ZTokCodec
    from ztok_fast.codec.zbatch import ZBatch

DEFAULT_CODEC = "ztok-mini"
MISTAKE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
"""Exit statuses besides 0; the last two are those that a shell reports for the signals."""

BAR_DELAY_SECONDS = 1.0


class UsageError(ValueError):
    """The command cannot do what it was asked to do."""


# Errors


def run_plainly(command: Callable[[], int], traceback: bool = False) -> int:
    """Run a command; turn errors that a user can fix into a message on standard error and an exit status.

    Those are ``OSError`` and the ``ValueError`` of this package. Any other exception is a bug and keeps its traceback.
    """
    streams.prepare()
    if sys.stdout is None:
        streams.say("ztok: error: standard output is closed")
        return MISTAKE
    try:
        with quiet_libraries():
            status = command()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        streams.flush()
        streams.say("ztok: interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has closed the pipe
        streams.flush()
        return BROKEN_PIPE
    except OSError as error:
        streams.flush()
        if traceback:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _mistake(f"{where}{error.strerror or error}")
    except (ValueError, FloatingPointError) as error:
        if traceback or not _raised_here(error):
            raise
        return _mistake(str(error))


def _mistake(message: str) -> int:
    streams.flush()
    streams.say(f"ztok: error: {message}")
    return MISTAKE


def _raised_here(error: Exception) -> bool:
    """Whether the line that raised ``error`` is in this package and not in a library."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    return step is not None and step.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "ztok_fast"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide warnings that libraries address to developers, such as deprecations."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|accelerate|huggingface_hub)(\.|$)")
        # Only `ztok compress` stores what it compresses, and it reports the loss itself.
        warnings.filterwarnings("ignore", category=LossyTextWarning)
        yield


@contextmanager
def collected_warnings(wanted: type[Warning]) -> Iterator[list]:
    """Yield a list that collects the warnings of the category ``wanted``; others are shown as usual."""
    with warnings.catch_warnings():
        show = warnings.showwarning
        found: list = []

        def collect(message, category, *where, **more) -> None:
            found.append(message) if issubclass(category, wanted) else show(message, category, *where, **more)

        warnings.showwarning = collect
        warnings.simplefilter("always", wanted)
        yield found


# Files


def check_input(path: str) -> Path:
    """The path of a file to read, or `UsageError` when there is none."""
    if Path(path).is_dir():
        raise UsageError(f"{path}: expected a file, got a folder")
    if not Path(path).exists():
        raise UsageError(f"{path}: there is no such file")
    return Path(path)


def read_bytes(path: str) -> bytes:
    """A file's bytes, or those of standard input for ``-``."""
    if path != "-":
        return check_input(path).read_bytes()
    if sys.stdin is None:
        raise UsageError("-: standard input is closed")
    return sys.stdin.buffer.read()


def check_output(path: str | Path, suffix: str | None = None, inputs: Sequence[str] = ()) -> Path:
    """The path of a file to write, refused before any work is done where it cannot be written.

    Args:
        suffix: what the name has to end in; inputs: files that are read, none of which may be the output.
    """
    if str(path) == "-":
        raise UsageError("output -: expected a file name, this cannot be written to standard output")
    path = Path(path)
    if suffix and path.suffix != suffix:
        raise UsageError(f"output {path}: expected a file name that ends in {suffix}")
    if path.is_dir():
        raise UsageError(f"output {path}: expected a file name, got a folder")
    for name in inputs:
        if path.exists() and Path(name).exists() and path.samefile(name):
            raise UsageError(f"output {path}: expected another file than the input {name}, which would be overwritten")
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"output {path}: the file is there and may not be written")
    if not path.exists() or path.is_file():  # a device or a pipe is written to where it is
        check_parent(path)
    return path


def check_outputs(
    options: argparse.Namespace, wanted: Sequence[tuple[str, str | None]], inputs: Sequence[str]
) -> dict[str, Path]:
    """The files of options such as ``--json``, each checked as in `check_output`; ``plot`` needs matplotlib.

    Args:
        wanted: names of options and the suffixes that their files have.
    """
    found: dict[str, Path] = {}
    for name, suffix in wanted:
        if (value := getattr(options, name)) is not None:
            path = check_output(value, suffix, inputs)
            if path.absolute() in (other.absolute() for other in found.values()):
                raise UsageError(f"--{name} {path}: expected another file than the other outputs")
            found[name] = path
    if "plot" in found and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot: needs matplotlib, pip install 'ztok-fast[bench]'")
    return found


def check_parent(path: Path) -> None:
    """Raise `UsageError` unless ``path`` can be made: its nearest existing parent is a writable folder."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UsageError(f"output {path}: cannot be written, {folder} is a file and not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"output {path}: cannot be written, no permission to make files in the folder {folder}")


def shown_name(path: str) -> str:
    """The name without its folders, which are nobody's business where a page is shown; bytes may be no UTF-8."""
    return os.fsencode(Path(path).name).decode("utf-8", "replace")


def load_batch(path: str, options: argparse.Namespace) -> ZBatch:
    """The Z-tokens of a file, read by the codec of ``options``."""
    check_batch_name(path)
    return load_codec(options).load(path)


def check_batch_name(path: str) -> Path:
    """The path of a ``.ztok`` file to read."""
    if path == "-":
        raise UsageError("-: expected the name of a .ztok file, which cannot be read from standard input")
    return check_input(path)


def form_name(path: str) -> str | None:
    """What units a file holds by how it begins: "coded" or "learned"; ``None`` for another file, or none."""
    from ztok_fast.codec.container import form_of

    form = form_of(path) if Path(path).is_file() else None
    return None if form is None else form.units


# Codec


def add_codec_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--codec", default=DEFAULT_CODEC, metavar="NAME|FOLDER", help=f"codec to use (default: {DEFAULT_CODEC})"
    )
    parser.add_argument(
        "--base", metavar="NAME|FOLDER", help="base model to use instead of the one that the codec names"
    )
    parser.add_argument(
        "--engine",
        default="auto",
        choices=("auto", "int8", "float32", "float"),
        help="what runs the base model: the engine in int8 or float32, or transformers (float); an exact file needs "
        "what made it, which auto takes (default: auto)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="where to compute (default: cpu); an exact file needs the device that made it",
    )


def load_codec(options: argparse.Namespace) -> ZTokCodec:
    """The codec that `add_codec_arguments` names; a command that asks again gets the same."""
    import torch

    from ztok_fast.codec.codec import ZTokCodec

    if (codec := getattr(options, "loaded_codec", None)) is not None:
        return codec
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device can be used here; `ztok doctor` says why")
    codec = ZTokCodec.from_pretrained(options.codec, base=options.base, engine=options.engine).to(options.device)
    options.loaded_codec = codec
    return codec


def tokenize(codec: ZTokCodec, texts: list[str]) -> list[list[int]]:
    """Text tokens as the codec sees them."""
    return codec.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


# Progress


def shows_progress() -> bool:
    return sys.stderr.isatty()


@contextmanager
def progress_bar(total: int | None, description: str, unit: str = " tokens") -> Iterator[Callable[[int], None]]:
    """A bar on stderr, on a terminal and once the work has taken a second; yields its ``update``.

    Args:
        total: tokens (or what ``unit`` says) of all the work; ``None`` where that is not known.
    """
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        delay=BAR_DELAY_SECONDS,
        leave=False,
        file=sys.stderr,
        disable=not shows_progress(),
    ) as bar:
        yield bar.update


def base_of(options: argparse.Namespace) -> tuple[BaseModel, str | None]:
    """The base model, and the precision that is asked for, ``None`` for any."""
    from ztok_fast.codec.base_model import load_base
    from ztok_fast.codec.coded import DEFAULT_BASE

    if options.engine == "float" or options.device != "cpu":
        raise UsageError("coded units: expected --engine int8 or float32 on the CPU, whose bits are the same anywhere")
    return load_base(str(options.base or DEFAULT_BASE)), None if options.engine == "auto" else options.engine
