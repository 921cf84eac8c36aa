"""Fills the README's blocks: the demo's real output, and the tables of measured numbers.

python -m bench.readme             run the demo, then write both blocks
python -m bench.readme --no-demo   only the tables, from docs/results/*.json
python -m bench.readme --check     exit code 1 when the tables are not those of the results
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from bench.environment import ROOT, summary
from bench.exact_roundtrip import report
from bench.model_card import data_sentence
from bench.tables import number, percent, table

README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results"


class BlockError(ValueError):
    """The README does not have the marked block that is to be filled."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__.split("\n")[0])
    parser.add_argument("--no-demo", action="store_true", help="leave the demo's output as it is")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the tables are out of date")
    options = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    try:
        filled = fill_block(text, "measured", measured(RESULTS))
        if options.check:
            if filled != text:
                print(
                    "error: README.md: its tables are not those of docs/results; run python -m bench.readme",
                    file=sys.stderr,
                )
            return int(filled != text)
        if not options.no_demo:
            filled = fill_block(filled, "demo output", f"```text\n{demo_output()}\n```")
    except (BlockError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    README.write_text(filled, encoding="utf-8")
    return 0


def fill_block(text: str, name: str, content: str) -> str:
    """Replace what stands between ``<!-- name -->`` and ``<!-- end of name -->``.

    Raises:
        BlockError: the block is not there, or not exactly once.
    """
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise BlockError(f"README: expected one block {name!r}, got {len(pattern.findall(text))}")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def demo_output() -> str:
    """What ``python -m ztok_fast.demo`` prints, without the blanks at the ends of its lines."""
    run = subprocess.run(
        [sys.executable, "-m", "ztok_fast.demo"], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    return "\n".join(line.rstrip() for line in run.stdout.strip().splitlines())


def measured(folder: Path) -> str:
    """The tables of every results file in ``folder``, each under the command that made it."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        if "points" in results:
            parts.append(curve_section(results))
        elif "families" in results:
            parts.append(exact_section(results))
    return "\n\n".join(parts) if parts else "No results file is in `docs/results` yet."


def curve_section(results: dict) -> str:
    """Accuracy with all residual levels, against fixed units and against no Z-tokens at all."""
    levels = max(point["levels"] for point in results["points"])
    rows = [
        [
            f"{p['budget']:g}",
            p["units"],
            number(p["ratio"]),
            number(p["rate"]),
            percent(p["teacher_forced"]),
            percent(p["free_running"]),
        ]
        for p in results["points"]
        if p["levels"] == levels
    ]
    base = results["base"]
    rows.append(["–", "no Z-tokens", "–", number(base["bits_per_token"]), percent(base["accuracy"]), "–"])
    headers = ["budget", "units", "ratio", "rate, bits/token", "teacher-forced", "free-running"]
    return (
        f"**{results['codec']['name']}**, {data_sentence(results['data'])}. The last row is the base model without Z-tokens: "
        "its rate is the text's own bits per token on the same segments, the bound on an exact rate.\n\n"
        f"{table(headers, rows)}\n\n{_made_with(results)}"
    )


def exact_section(results: dict) -> str:
    return (
        f"**Exact mode** at a budget of {results['ratio']:g}: compressed, saved, loaded, decompressed, compared.\n\n"
        f"{report(results['families'])}\n\n{_made_with(results)}"
    )


def _made_with(results: dict) -> str:
    return f"Measured by `{results['environment']['command']}` ({summary(results['environment'])})."


if __name__ == "__main__":
    raise SystemExit(main())
