"""Entry point of ``ztok``: arguments and exit status.

torch and transformers are imported by the commands that need them, so ``ztok --help`` is fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ztok_fast import __version__
from ztok_fast.cli import compress, decompress, doctor, evaluation, info, profile, training, view, zspace
from ztok_fast.cli.common import run_plainly

DESCRIPTION = "Compress text into short sequences of discrete latent codes (Z-tokens) with a language model, and back."
EXIT_STATUSES = """\
exit status:
  0    done
  1    a bug in ztok; the traceback is on standard error
  2    ztok cannot do what was asked; a message on standard error says why
  130  interrupted (Ctrl-C)
  141  the reader of standard output closed the pipe

An output file is written completely or not at all.

`ztok COMMAND --help` lists the options of a command.
"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the epilog, and room for the longest command's name before its help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=18)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ztok",
        description=DESCRIPTION,
        epilog=EXIT_STATUSES,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ztok {__version__}", help="print the version")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of every error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (compress, decompress, zspace, info, view, evaluation, profile, training, doctor):
        module.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ztok``; returns its exit status, as ``ztok --help`` lists them."""
    arguments = sys.argv[1:] if argv is None else list(argv)

    def command() -> int:
        try:
            options = build_parser().parse_args(arguments)
        except SystemExit as stop:  # argparse has printed the help, or what is wrong
            return int(stop.code or 0)
        options.arguments = arguments
        return options.run(options)

    return run_plainly(command, traceback="--traceback" in arguments)
