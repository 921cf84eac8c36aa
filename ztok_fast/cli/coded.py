"""Coded units on the command line: ``ztok compress --units coded``, and decompressing such files."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ztok_fast.cli import common, corpus, streams

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec
    from ztok_fast.codec.zbatch import ZBatch


def is_coded(path: str) -> bool:
    """Whether a file exists and holds coded units."""
    from ztok_fast.codec.coded_file import is_coded_file

    return Path(path).is_file() and is_coded_file(path)


def compress(options: argparse.Namespace, output_name: str) -> int:
    """Files or stdin to one file of coded units."""
    from ztok_fast.codec.coded import TextCoder
    from ztok_fast.codec.coded_file import PRECISIONS
    from ztok_fast.codec.coded_writer import write_coded

    for name in ("exact", "ratio", "levels", "fixed_units"):
        if getattr(options, name):
            given = name.replace("_", "-")
            raise common.UsageError(
                f"--units coded: expected no --{given}, which is for learned units (coded are exact)"
            )
    parquet = options.corpus is not None and output_name.endswith(".parquet")
    inputs = [options.corpus] if options.corpus is not None else options.files
    output = common.check_output(output_name, suffix=".parquet" if parquet else ".ztok", inputs=inputs)
    for name in inputs:
        if name != "-":
            common.check_input(name)
    total = sum(Path(name).stat().st_size for name in options.files if name != "-")  # of a corpus it is not known
    started, done = time.perf_counter(), [0]
    base, precision = common.base_of(options)
    sizes = {name: getattr(options, name) for name in ("context", "window") if getattr(options, name) is not None}
    coder = TextCoder(base, precision or PRECISIONS[0], **sizes)
    with common.progress_bar(total or None, "compress", unit="B") as progress:

        def count(size: int) -> None:
            done[0] += size
            progress(size)

        verify = not options.no_verify
        if parquet:
            from ztok_fast.codec.coded_corpus import compress_coded_corpus

            column = options.text_column
            corpus.or_usage_error(
                lambda: compress_coded_corpus(
                    coder, options.corpus, output, text_column=column, verify=verify, progress=count
                )
            )
            size = output.stat().st_size
        else:
            parts = _all_parts(options.files) if options.corpus is None else corpus.parts(options)
            size = corpus.or_usage_error(lambda: write_coded(output, parts, coder, verify, count))
    seconds = time.perf_counter() - started
    print(f"{output}: {done[0]:,} bytes -> {size:,}, {_rate(size, done[0])}, {seconds:.1f} s")
    sys.stdout.flush()
    return 0


def _rate(size: int, text: int) -> str:
    return f"{8 * size / text:.3f} bits per byte" if text else "no text"


def decompress(options: argparse.Namespace, check_output: Callable[[Path, int, str], None]) -> int:
    """A file of coded units back to its documents."""
    from ztok_fast.codec.coded_documents import CodedFile, stored_length
    from ztok_fast.codec.coded_file import coder_for, read_coded
    from ztok_fast.files import replace_atomically

    started, written = time.perf_counter(), 0
    documents, size = stored_length(options.file)
    wanted = options.document
    if wanted is not None and not 0 <= wanted < documents:
        raise common.UsageError(f"--document: expected 0 to {documents - 1}, got {wanted}")
    output = None if options.output == "-" else Path(options.output)
    if output is not None:
        check_output(output, 1 if wanted is not None else documents, options.file)
    coder = coder_for(options.file, *common.base_of(options))
    with ExitStack() as stack:
        parts: Iterator[tuple[int, bytes]]
        if wanted is not None:
            file = stack.enter_context(CodedFile(options.file, coder))
            parts = ((wanted, text) for text in file.parts(wanted))
        else:
            progress = stack.enter_context(common.progress_bar(size, "decompress", unit="B"))
            parts = _numbered(read_coded(options.file, coder, progress))
        if output is None:
            for _, text in parts:
                streams.write(text)
            return 0
        temporary = stack.enter_context(replace_atomically(output))
        several = documents > 1 and wanted is None
        if several:
            temporary.mkdir()
        for number, text in parts:
            with (temporary / f"{number:04d}.txt" if several else temporary).open("ab") as out:
                out.write(text)
            written += len(text)
    stored, seconds = Path(options.file).stat().st_size, time.perf_counter() - started
    what = f"document {wanted}, " if wanted is not None else f"{_rate(stored, written)}, "
    print(f"{output}: {written:,} bytes from {options.file}, {what}{seconds:.1f} s")
    sys.stdout.flush()
    return 0


def learned(options: argparse.Namespace, codec: ZTokCodec, what: str) -> ZBatch:
    """The documents of a file of coded units as learned units of a codec, and a line on stderr that says so."""
    from ztok_fast.codec.base_model import load_base
    from ztok_fast.codec.coded import DEFAULT_BASE
    from ztok_fast.codec.coded_file import coder_for, read_coded
    from ztok_fast.codec.errors import CodedUnitsWarning, ZFileError

    streams.say(f"ztok: note: {CodedUnitsWarning(f'{what} {options.file}')}")
    try:
        coder = coder_for(options.file, load_base(str(DEFAULT_BASE)))
    except ZFileError:
        coder = coder_for(options.file, codec.base)
    documents: list[bytearray] = []
    for number, text in _numbered(read_coded(options.file, coder)):
        documents += [bytearray()] * (number == len(documents))
        documents[number] += text
    return codec.compress([bytes(document) for document in documents])


def _all_parts(names: list[str]) -> Iterator[tuple[bytes, bool]]:
    from ztok_fast.codec.coded_file import parts_of

    for name in names:
        if name == "-":
            yield from parts_of(sys.stdin.buffer)
        else:
            with open(name, "rb") as stream:
                yield from parts_of(stream)


def _numbered(parts: Iterator[tuple[bytes, bool]]) -> Iterator[tuple[int, bytes]]:
    number = 0
    for text, goes_on in parts:
        yield number, text
        number += not goes_on
