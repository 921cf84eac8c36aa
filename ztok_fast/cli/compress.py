"""``ztok compress``: files or stdin to one ``.ztok`` file, or a Parquet file of texts to one of codes."""

from __future__ import annotations

import argparse
import sys

from ztok_fast.cli import common, streams
from ztok_fast.codec.errors import LossyTextWarning


def add_commands(commands) -> None:
    parser = commands.add_parser(
        "compress",
        help="compress text files or stdin to a .ztok file",
        description="Compress text. Several files become the documents of one .ztok file. "
        "Without --exact, decompression gives an approximation of the text.",
    )
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("files", nargs="*", default=[], metavar="FILE", help="text files; - reads stdin")
    inputs.add_argument(
        "--corpus",
        metavar="DOCS.parquet",
        help="a Parquet file with a text in each row, to a Parquet file of codes "
        "(or, with --units coded, to one .ztok file)",
    )
    parser.add_argument("-o", "--output", metavar="OUT.ztok", help="default: FILE.ztok beside a single FILE")
    parser.add_argument(
        "--text-column", default="text", metavar="NAME", help="with --corpus: the column of the texts (default: text)"
    )
    parser.add_argument("-r", "--ratio", type=float, help="text tokens per Z-token (default: 4)")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="also store what the decompressor would guess wrong, so that every byte is restored",
    )
    parser.add_argument("--levels", type=int, metavar="N", help="residual quantizer levels to use (default: all)")
    parser.add_argument(
        "--fixed-units",
        action="store_true",
        default=None,
        help="one Z-token for every RATIO tokens, instead of units of learned length",
    )
    parser.add_argument(
        "--keep",
        action="append",
        metavar="START:END",
        help="characters whose every token is written whatever the ratio, of a single FILE; may be given again",
    )
    parser.add_argument(
        "--question", metavar="TEXT", help="where the ratio leaves few slots, they go to what shares words with TEXT"
    )
    parser.add_argument(
        "--units",
        choices=("learned", "coded"),
        default="learned",
        help="learned: Z-tokens that models read; coded: the text itself, exactly, coded with a language model "
        "(--base, default: mini-base), far smaller than xz (default: learned)",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="with --units coded: tokens of one segment, a power of two; more take fewer bits and decode slower "
        "(default: 512)",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="with --units coded: tokens that the model sees at once, a power of two (default: 512)",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="with --exact or --units coded: do not decode what was encoded to compare it",
    )
    common.add_codec_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    for name in ("keep", "question"):
        if getattr(options, name) is not None and (options.units == "coded" or options.corpus is not None):
            raise common.UsageError(f"--{name}: expected learned units of files with it, got coded units or a corpus")
    if options.units == "coded":
        from ztok_fast.cli import coded

        return coded.compress(options, _output_name(options))
    for name in ("context", "window"):
        if getattr(options, name) is not None:
            raise common.UsageError(f"--{name}: expected --units coded with it, got learned units")
    if options.no_verify and not options.exact:
        raise common.UsageError("--no-verify: expected --exact or --units coded with it, got neither")
    options.ratio = 4.0 if options.ratio is None else options.ratio
    if options.corpus is not None:
        return _run_corpus(options)
    spans = _spans(options)
    output = common.check_output(_output_name(options), suffix=".ztok", inputs=options.files)
    documents = [common.read_bytes(name) for name in options.files]
    codec = common.load_codec(options)
    total = 0
    if common.shows_progress():
        total = sum(map(len, codec.tokenize([d.decode("utf-8", "replace") for d in documents])))
    # Exact mode decodes, or encodes once more, all that it has compressed.
    with (
        common.progress_bar(2 * total if options.exact else total, "compress") as progress,
        common.collected_warnings(LossyTextWarning) as losses,
    ):
        z = codec.compress(
            documents,
            options.ratio,
            options.exact,
            levels=options.levels,
            fixed_units=options.fixed_units,
            keep=spans,
            question=options.question,
            verify=not options.no_verify,
            progress=progress,
        )
    codec.save(z, output)
    from ztok_fast.cli.report import number

    rate = f"{number(z.rate)} bits per token"
    if options.exact:
        rate += f", {number(z.rate_exact)} exact"
    print(
        f"{output}: {z.tokens:,} tokens -> {z.ztokens:,} Z-tokens, ratio {number(z.achieved_ratio)}, {rate}; "
        f"{sum(map(len, documents)):,} bytes -> {output.stat().st_size:,}"
    )
    sys.stdout.flush()
    for loss in losses:
        streams.say(_describe_loss(loss, options.files))
    return 0


def _spans(options: argparse.Namespace) -> list[list[tuple[int, int]]] | None:
    if options.keep is None:
        return None
    if len(options.files) != 1:
        raise common.UsageError(f"--keep: expected a single FILE with it, got {len(options.files)}")
    found = []
    for span in options.keep:
        start, colon, end = span.partition(":")
        if not (colon and start.isascii() and start.isdigit() and end.isascii() and end.isdigit()):
            raise common.UsageError(f"--keep: expected START:END in characters, such as 120:180, got {span!r}")
        found.append((int(start), int(end)))
    return [found]


def _run_corpus(options: argparse.Namespace) -> int:
    if options.output is None:
        raise common.UsageError("-o: expected a file name ending in .parquet for the Z-tokens of a corpus, got none")
    output = common.check_output(options.output, suffix=".parquet", inputs=[options.corpus])
    common.check_input(options.corpus)
    from ztok_fast.cli.report import number
    from ztok_fast.codec.corpus import compress_corpus

    codec = common.load_codec(options)
    with (
        common.progress_bar(None, "compress") as progress,
        common.collected_warnings(LossyTextWarning) as losses,
    ):
        try:
            totals = compress_corpus(
                codec,
                options.corpus,
                output,
                options.ratio,
                options.exact,
                text_column=options.text_column,
                levels=options.levels,
                fixed_units=options.fixed_units,
                verify=not options.no_verify,
                progress=progress,
            )
        except ImportError as error:
            raise common.UsageError(str(error)) from error
    ratio = number(totals.tokens / totals.ztokens) if totals.ztokens else "-"
    print(
        f"{output}: {totals.documents:,} documents, {totals.tokens:,} tokens -> {totals.ztokens:,} Z-tokens, "
        f"ratio {ratio}; {output.stat().st_size:,} bytes"
    )
    sys.stdout.flush()
    if losses:
        changed = sum(len(loss.documents) for loss in losses)
        streams.say(f"ztok: warning: the tokenizer changes the text of {changed} documents; --exact keeps every byte")
    return 0


def _output_name(options: argparse.Namespace) -> str:
    if options.files.count("-") > 1:
        raise common.UsageError("FILE: expected stdin (-) at most once")
    if options.output is not None:
        return options.output
    if options.corpus is not None:
        raise common.UsageError("-o: expected a file name ending in .parquet or .ztok for a corpus, got none")
    if len(options.files) > 1 or options.files == ["-"]:
        what = "stdin" if options.files == ["-"] else "several files"
        raise common.UsageError(f"-o: expected a file name ending in .ztok for the Z-tokens of {what}, got none")
    return options.files[0] + ".ztok"


def _describe_loss(loss: LossyTextWarning, names: list[str]) -> str:
    first, others = names[loss.documents[0]], len(loss.documents) - 1
    which = f"{first} and {others} more" if others else first
    return (
        f"ztok: warning: {which}: bytes that are not text, from byte {loss.first_byte} on, are lost; "
        "--exact keeps every byte"
    )
