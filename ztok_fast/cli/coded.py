"""Coded units on the command line: ``ztok compress --units coded``, and decompressing such files."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ztok_fast.cli import common, corpus, documents, streams

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec
    from ztok_fast.codec.zbatch import ZBatch


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
    inputs = documents.check_inputs(options)
    output = common.check_output(output_name, suffix=".parquet" if parquet else ".ztok", inputs=inputs)
    started, done = time.perf_counter(), [0]
    base, precision = common.base_of(options)
    sizes = {name: getattr(options, name) for name in ("context", "window") if getattr(options, name) is not None}
    coder = TextCoder(base, precision or PRECISIONS[0], **sizes)
    with common.progress_bar(documents.input_bytes(options), "compress", unit="B") as progress:

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
            parts = documents.input_parts(options)
            size = corpus.or_usage_error(lambda: write_coded(output, parts, coder, verify, count))
    seconds = time.perf_counter() - started
    print(f"{output}: {done[0]:,} bytes -> {size:,}, {documents.bits_per_byte(size, done[0])}, {seconds:.1f} s")
    sys.stdout.flush()
    return 0


def decompress(options: argparse.Namespace) -> int:
    """A file of coded units back to its documents."""
    from ztok_fast.codec.coded_file import CodedFile, coder_for, read_coded
    from ztok_fast.codec.container import CODED_FORM
    from ztok_fast.codec.container_file import stored_length

    started = time.perf_counter()
    count, size = stored_length(options.file, CODED_FORM)
    wanted = documents.check_wanted(options, count)
    count = count if wanted is None else 1
    output = documents.check_output(options, count)
    coder = coder_for(options.file, *common.base_of(options))
    with ExitStack() as stack:
        parts: Iterator[tuple[bytes, bool]]
        if wanted is not None:
            file = stack.enter_context(CodedFile(options.file, coder))
            parts = ((text, True) for text in file.parts(wanted))
        else:
            progress = stack.enter_context(common.progress_bar(size, "decompress", unit="B"))
            parts = read_coded(options.file, coder, progress)
        documents.write_parts(options, output, parts, count, started)
    return 0


def learned(options: argparse.Namespace, codec: ZTokCodec, what: str) -> ZBatch:
    """The documents of a file of coded units as learned units of a codec, and a line on stderr that says so."""
    from ztok_fast.codec.base_model import load_base
    from ztok_fast.codec.coded import DEFAULT_BASE
    from ztok_fast.codec.coded_file import CodedFile, coder_for
    from ztok_fast.codec.errors import CodedUnitsWarning, ZFileError

    streams.say(f"ztok: note: {CodedUnitsWarning(f'{what} {options.file}')}")
    try:
        coder = coder_for(options.file, load_base(str(DEFAULT_BASE)))
    except ZFileError:
        coder = coder_for(options.file, codec.base)
    with CodedFile(options.file, coder) as file:
        return codec.compress(list(file))
