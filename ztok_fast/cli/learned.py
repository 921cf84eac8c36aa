"""Learned units on the command line: files or a corpus to one ``.ztok`` file, and decompressing such files."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

from ztok_fast.cli import common, corpus, documents, streams
from ztok_fast.cli.report import number
from ztok_fast.codec.errors import LossyTextWarning


def compress(options: argparse.Namespace, output_name: str) -> int:
    """Files or stdin, or a corpus, to one file of learned units."""
    from ztok_fast.codec.learned_writer import write_learned

    started, done = time.perf_counter(), [0]
    inputs = documents.check_inputs(options)
    output = common.check_output(output_name, suffix=".ztok", inputs=inputs)
    choices = {"levels": options.levels, "fixed_units": options.fixed_units}
    if options.keep is not None:
        choices["keep"] = _spans(options)
    if options.question is not None:
        choices["question"] = options.question
    codec = common.load_codec(options)
    with (
        common.progress_bar(documents.input_bytes(options), "compress", unit="B") as progress,
        common.collected_warnings(LossyTextWarning) as losses,
    ):

        def count(size: int) -> None:
            done[0] += size
            progress(size)

        written = corpus.or_usage_error(
            lambda: write_learned(
                output,
                documents.input_parts(options),
                codec,
                options.ratio,
                options.exact,
                verify=not options.no_verify,
                progress=count,
                **choices,
            )
        )
    tokens, seconds = written.tokens, time.perf_counter() - started
    rate = f"{number(written.bits / tokens if tokens else None)} bits per token"
    if options.exact:
        rate += f", {number(written.bits_exact / tokens if tokens else None)} exact"
    ratio = number(tokens / written.ztokens if written.ztokens else None)
    there = f" ({written.resumed:,} of them were there)" if written.resumed else ""
    print(
        f"{output}: {tokens:,} tokens -> {written.ztokens:,} Z-tokens, ratio {ratio}, {rate}; "
        f"{done[0]:,} bytes{there} -> {written.size:,}, {documents.bits_per_byte(written.size, done[0])}, "
        f"{seconds:.1f} s"
    )
    sys.stdout.flush()
    if losses:
        streams.say(_describe(losses, options.files))
    return 0


def decompress(options: argparse.Namespace) -> int:
    """A file of learned units back to text."""
    from ztok_fast.codec.container import LEARNED_FORM
    from ztok_fast.codec.container_file import stored_length
    from ztok_fast.codec.errors import ExactMismatchError
    from ztok_fast.codec.learned_file import LearnedFile

    started = time.perf_counter()
    count, size = stored_length(common.check_batch_name(options.file), LEARNED_FORM)
    wanted = documents.check_wanted(options, count)
    count = count if wanted is None else 1
    output = documents.check_output(options, count)
    codec = common.load_codec(options)
    with ExitStack() as stack:
        parts: Iterator[tuple[bytes, bool]]
        if wanted is not None:
            file = stack.enter_context(LearnedFile(options.file, codec))
            parts = ((text, True) for text in file.text(wanted))
        else:
            progress = stack.enter_context(common.progress_bar(size or None, "decompress", unit="B"))
            parts = _texts(options.file, codec, progress)
        try:
            documents.write_parts(options, output, parts, count, started)
        except ExactMismatchError as error:
            raise common.UsageError(f"{options.file}: {error}") from error
    return 0


def _texts(path: str, codec, progress) -> Iterator[tuple[bytes, bool]]:
    from ztok_fast.codec.learned_file import Reading, read_units

    for block, goes_on in read_units(path, Reading.of(codec)):
        for own in zip(codec.decompress_bytes(block), goes_on):
            progress(len(own[0]))
            yield own


def _spans(options: argparse.Namespace) -> list[list[tuple[int, int]]]:
    from ztok_fast.codec.coded import PART_BYTES

    if len(options.files) != 1:
        raise common.UsageError(f"--keep: expected a single FILE with it, got {len(options.files)}")
    if (documents.input_bytes(options) or 0) > PART_BYTES:
        raise common.UsageError(f"--keep: expected a FILE of at most {PART_BYTES:,} bytes with it, got a longer one")
    found = []
    for span in options.keep:
        start, colon, end = span.partition(":")
        if not (colon and start.isascii() and start.isdigit() and end.isascii() and end.isdigit()):
            raise common.UsageError(f"--keep: expected START:END in characters, such as 120:180, got {span!r}")
        found.append((int(start), int(end)))
    return [found]


def _describe(losses: list[LossyTextWarning], names: list[str]) -> str:
    first, lost = losses[0], sorted({number for loss in losses for number in loss.documents})
    which = names[lost[0]] if names else f"document {lost[0]}"
    if len(lost) > 1:
        which += f" and {len(lost) - 1} more"
    return (
        f"ztok: warning: {which}: bytes that are not text, from byte {first.first_byte} on, are lost; "
        "--exact keeps every byte"
    )
