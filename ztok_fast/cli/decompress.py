"""``ztok decompress``: a ``.ztok`` file back to text."""

from __future__ import annotations

import argparse

from ztok_fast.cli import common


def add_commands(commands) -> None:
    parser = commands.add_parser(
        "decompress",
        help="turn a .ztok file, or a corpus in Parquet, back into text",
        description="Decompress a .ztok file, or a Parquet file that `ztok compress --corpus` made. Coded units, "
        "and a file made with --exact, give the original byte for byte; any other gives an approximation.",
    )
    parser.add_argument("file", metavar="FILE", help="a .ztok file, or a Parquet file of Z-tokens or coded units")
    parser.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="OUT",
        help="file to write, a new folder for several documents, or OUT.parquet for those of Parquet (default: -, all "
        "documents to stdout)",
    )
    parser.add_argument("--document", type=int, metavar="N", help="decompress only document N, counted from 0")
    common.add_codec_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ztok_fast.cli import coded, corpus, learned

    if corpus.is_parquet(options.file):
        return corpus.decompress(options)
    if common.form_name(options.file) == "coded":
        return coded.decompress(options)
    return learned.decompress(options)
