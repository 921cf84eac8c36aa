"""Entry point of ``ztok``: arguments, and errors in plain words.

torch and transformers are imported by the commands that need them, so that ``ztok --help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ztok_fast import __version__
from ztok_fast.cli import compress, decompress, doctor, evaluation, info, training, zspace
from ztok_fast.cli.common import run_plainly

DESCRIPTION = "Compress text into short sequences of discrete latent codes (Z-tokens) with a language model, and back."
EXIT_STATUSES = """\
exit status:
  0    done
  2    the command cannot do what was asked, and the last line on standard error says why; files are as before
  130  interrupted (Ctrl-C)
  141  whatever read the standard output has closed it

`ztok COMMAND --help` describes a command.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ztok",
        description=DESCRIPTION,
        epilog=EXIT_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ztok {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (compress, decompress, zspace, info, evaluation, training, doctor):
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
        return options.run(options)

    return run_plainly(command, traceback="--traceback" in arguments)
