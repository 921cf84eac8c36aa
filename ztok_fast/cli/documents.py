"""Documents in and out on the command line, part by part."""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ztok_fast.cli import common, streams


def check_inputs(options: argparse.Namespace) -> list[str]:
    """The names of the files that are read, all of which exist."""
    names = [options.corpus] if options.corpus is not None else options.files
    for name in names:
        if name != "-":
            common.check_input(name)
        elif sys.stdin is None:
            raise common.UsageError("-: standard input is closed")
    return names


def input_bytes(options: argparse.Namespace) -> int | None:
    """Bytes of text of all files, as far as they are known before they are read."""
    return sum(Path(name).stat().st_size for name in options.files if name != "-") or None


def input_parts(options: argparse.Namespace) -> Iterator[tuple[bytes, bool]]:
    """The parts of the files' documents, or of the texts of ``--corpus``."""
    from ztok_fast.codec.container_writer import parts_of

    if options.corpus is not None:
        from ztok_fast.codec.corpus import read_texts

        for _, texts in read_texts(options.corpus, options.text_column):
            for text in texts:
                yield from parts_of(io.BytesIO(text.encode()))
    for name in options.files:
        if name == "-":
            yield from parts_of(sys.stdin.buffer)
        else:
            with open(name, "rb") as stream:
                yield from parts_of(stream)


def check_wanted(options: argparse.Namespace, documents: int) -> int | None:
    """The document that ``--document`` names, or ``None`` for all."""
    if options.document is not None and not 0 <= options.document < documents:
        raise common.UsageError(f"--document: expected 0 to {documents - 1}, got {options.document}")
    return options.document


def check_output(options: argparse.Namespace, documents: int) -> Path | None:
    """Where so many documents are written: a file or a folder; ``None`` is standard output."""
    if options.output == "-":
        return None
    output = Path(options.output)
    if documents == 1:
        return common.check_output(output, inputs=[options.file])
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise common.UsageError(
            f"output {output}: expected a new or empty folder for {documents} documents, got one that exists; "
            "--document N takes one of them"
        )
    common.check_parent(output)
    return output


def write_parts(
    options: argparse.Namespace,
    output: Path | None,
    parts: Iterator[tuple[bytes, bool]],
    documents: int,
    started: float,
) -> None:
    """Write the parts of so many documents, and say what was written; a file appears only when it is complete."""
    if output is None:
        for text, _ in parts:
            streams.write(text)
        return
    from ztok_fast.files import replace_atomically

    written = number = 0
    with replace_atomically(output) as temporary:
        if documents != 1:
            temporary.mkdir()
        for text, goes_on in parts:
            with (temporary / f"{number:04d}.txt" if documents != 1 else temporary).open("ab") as out:
                out.write(text)
            written += len(text)
            number += not goes_on
    seconds, stored = time.perf_counter() - started, Path(options.file).stat().st_size
    what = f"{bits_per_byte(stored, written)}, " if options.document is None else f"document {options.document}, "
    print(f"{output}: {written:,} bytes from {options.file}, {what}{seconds:.1f} s")
    sys.stdout.flush()


def bits_per_byte(size: int, text: int) -> str:
    return f"{8 * size / text:.3f} bits per byte" if text else "no text"
