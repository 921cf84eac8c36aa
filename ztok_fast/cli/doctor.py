"""``ztok doctor``: what runs here and why (:mod:`ztok_fast.doctor`)."""

from __future__ import annotations

import argparse


def add_commands(commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="show what runs here and why",
        description="Print versions, devices, compiled libraries and the backend that is chosen for each op.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ztok_fast import doctor

    return doctor.main(["--json"] if options.json else [])
