"""Entry point of ``ztok``: arguments, and errors in plain words.

torch and transformers are imported by the commands that need them, so that ``ztok --help`` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ztok_fast.cli import compress, decompress, doctor, evaluation, info, training, zspace
from ztok_fast.cli.common import run_plainly

DESCRIPTION = "Compress text into short sequences of discrete latent codes (Z-tokens) with a language model, and back."


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ztok", description=DESCRIPTION)
    parser.add_argument("--traceback", action="store_true", help="show where in the program an error arose")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (compress, decompress, zspace, info, evaluation, training, doctor):
        module.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ztok``; returns its exit status: 0, 2 for a mistake in what was asked, 130 after Ctrl-C."""
    try:
        options = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help, or what is wrong
        return int(stop.code or 0)
    return run_plainly(lambda: options.run(options), traceback=options.traceback)
