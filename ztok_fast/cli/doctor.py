"""``ztok doctor``: versions, devices and backends (`ztok_fast.doctor`)."""

from __future__ import annotations

import argparse


def add_commands(commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="list versions, devices and the backend of each op",
        description="Print versions, devices and compiled libraries, and for each op its backends "
        "and why one is chosen.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ztok_fast import doctor

    return doctor.main(["--json"] if options.json else [])
