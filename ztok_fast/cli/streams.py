"""Standard output and standard error: every byte arrives, or the command fails."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress


class _StandardOutput(io.FileIO):
    """The file under standard output; its errors name it."""

    def write(self, data, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "standard output"
            raise


def prepare() -> None:
    """Make the standard streams safe to print to; call it before anything is printed.

    - ``PYTHONUNBUFFERED`` and ``python -u`` put no buffer under standard output. One write may then be short, without
      an error, where the disk is full or a file has its greatest size. A buffer writes on until the system objects.
    - A name or a text may hold what the terminal's encoding lacks. It is printed escaped.
    - Standard error may be closed. Messages then go nowhere; ``print`` would send them to standard output.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    buffer = sys.stdout.buffer
    if type(getattr(buffer, "raw", buffer)) is io.FileIO:
        sys.stdout.flush()
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_StandardOutput(buffer.fileno(), "w", closefd=False)),
            encoding=sys.stdout.encoding,
            line_buffering=sys.stdout.line_buffering or isinstance(buffer, io.RawIOBase),
        )
    sys.stdout.reconfigure(errors="backslashreplace")


def write(data: bytes) -> None:
    """Write bytes to standard output as they are: a decompressed text need not be UTF-8."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def flush() -> None:
    """Flush standard output; where that fails drop what is left, so that Python's own flush at exit succeeds."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, sys.stdout.fileno())
            os.close(devnull)


def say(message: str) -> None:
    """Print a line on standard error; nobody may be there to read it."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)
