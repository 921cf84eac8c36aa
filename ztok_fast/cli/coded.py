"""Coded units on the command line: ``ztok compress --units coded``, and decompressing such files."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ztok_fast.cli import common, corpus, documents, report, streams

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec
    from ztok_fast.codec.coded_units import UnitCoder
    from ztok_fast.codec.zbatch import ZBatch


def compress(options: argparse.Namespace, output_name: str) -> int:
    """Files or stdin to one file of coded units."""
    from ztok_fast.codec.aligned_parts import ZTokenSize
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
    if options.aligned:
        coder = coder.aligned(ZTokenSize())
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


def describe(options: argparse.Namespace) -> int:
    """Say what a file of coded units holds; with ``--units`` also its texts, Z-token by Z-token."""
    from ztok_fast.codec.coded_file import CodedFile, coder_for
    from ztok_fast.codec.coded_units import unit_coder_of

    coder, aligned = unit_coder_of(options.target, coder_for(options.target, *common.base_of(options)))
    print(report.pairs(_facts(options.target, coder, aligned)))
    if options.units:
        with CodedFile(options.target, coder.coder) as file:
            for number, text in enumerate(file):
                print(f"\ndocument {number}:")
                (tokens,) = coder.coder.tokens([text])
                if text and not tokens:
                    print("  no text that the model's tokens can represent: stored without them")
                    continue
                lengths = coder.compress([text], aligned).unit_lengths.tolist()
                report.show_units(coder.coder.base.tokenizer, tokens, lengths, options.tokens)
    return 0


def _facts(path: str, coder: UnitCoder, aligned: bool) -> list[tuple[str, object]]:
    from ztok_fast.codec.coded import ALIGNED, CODED
    from ztok_fast.codec.coded_file import stored_parts

    own, size, bits = coder.coder, coder.size, math.log2(coder.size.values)
    count = text = parts = other = tokens = ztokens = 0
    for head, payload in stored_parts(path):
        count, text, parts = count + (not head.goes_on), text + head.length, parts + 1
        if head.kind == ALIGNED:
            part = own.read_aligned(payload, head.length)
            tokens, ztokens = tokens + part.tokens, ztokens + sum(map(len, part.windows))
        elif head.kind == CODED:
            for length, stream in own.read_segments(payload, head.length):
                tokens, ztokens = tokens + length, ztokens + max(1, math.ceil(8 * len(stream) / bits))
        else:
            other += 1
    stored = Path(path).stat().st_size
    return [
        ("documents", f"{count:,}"),
        ("original", f"{text:,} bytes"),
        ("this file", f"{stored:,} bytes, {documents.bits_per_byte(stored, text)}"),
        ("parts", f"{parts:,}, {other:,} of them stored without the model"),
        ("text tokens", f"{tokens:,}"),
        ("Z-tokens", f"{ztokens:,} of {size.levels} codes from {size.codebook_size:,}"),
        ("form", "aligned: each Z-token ends with a token" if aligned else "stream"),
        ("achieved ratio", f"{report.number(tokens / ztokens if ztokens else None)} text tokens per Z-token"),
        ("rate", f"{report.number(ztokens * bits / tokens if tokens else None)} bits per text token"),
        ("coder", f"{own.base.name}, {own.engine.precision}, context {own.context}, window {own.window}"),
    ]


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
