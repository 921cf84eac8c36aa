"""Results of an evaluation as the files that its options name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def write_results(results: dict, markdown: str, outputs: Mapping[str, Path]) -> None:
    """Write the outputs ``json`` and ``markdown``, those of them that are asked for, whole or not at all."""
    from ztok_fast.files import replace_atomically

    for name, text in (("json", json.dumps(results, indent=2) + "\n"), ("markdown", markdown)):
        if name in outputs:
            with replace_atomically(outputs[name]) as temporary:
                temporary.write_text(text, encoding="utf-8")
