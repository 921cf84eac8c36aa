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
        help="a Parquet file with a text in each row, to a Parquet file of codes or to one .ztok file",
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
        "--aligned",
        action="store_true",
        help="with --units coded: each Z-token ends with a token, so that the first ones give the text's beginning; "
        "larger",
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
    for name in ("context", "window", "aligned"):
        if getattr(options, name):
            raise common.UsageError(f"--{name}: expected --units coded with it, got learned units")
    if options.no_verify and not options.exact:
        raise common.UsageError("--no-verify: expected --exact or --units coded with it, got neither")
    options.ratio = 4.0 if options.ratio is None else options.ratio
    if options.corpus is not None and not (options.output or "").endswith(".ztok"):
        return _run_corpus(options)
    from ztok_fast.cli import learned

    return learned.compress(options, _output_name(options))


def _run_corpus(options: argparse.Namespace) -> int:
    if options.output is None:
        raise common.UsageError("-o: expected a file name ending in .parquet or .ztok for a corpus, got none")
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
