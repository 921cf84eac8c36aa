"""Results of an evaluation as the files that its options name."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from pathlib import Path


def environment(options: argparse.Namespace) -> dict:
    """The command line and the machine, for a results file."""
    from ztok_fast import doctor

    return {"command": shlex.join(["ztok", *options.arguments]), **doctor.environment()}


def write_results(results: dict, markdown: str, outputs: Mapping[str, Path]) -> None:
    """Write the outputs ``json`` and ``markdown``, those of them that are asked for, whole or not at all."""
    from ztok_fast.files import replace_atomically

    for name, text in (("json", json.dumps(results, indent=2) + "\n"), ("markdown", markdown)):
        if name in outputs:
            with replace_atomically(outputs[name]) as temporary:
                temporary.write_text(text, encoding="utf-8")
