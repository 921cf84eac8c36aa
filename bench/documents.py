"""Writes measured numbers into the README and the model cards, so that none is typed by hand.

python -m bench.documents readme              run the demo, then fill the README's blocks from docs/results/*.json
python -m bench.documents readme --no-demo    only the tables
python -m bench.documents readme --check      exit status 1 when the tables are not those of the results
python -m bench.documents card ztok_fast/models/ztok-mini            write README.md of codec folders (`bench.card`)
python -m bench.documents card ztok_fast/models/ztok-mini --check    exit status 1 when it is not that of the files
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from bench.card import RESULTS, CardError, card
from bench.machine import ROOT, made_with
from bench.tables import number, percent, table
from ztok_fast.codec.config import ConfigError
from ztok_fast.codec.weights import WeightsError

README = ROOT / "README.md"


class DocumentError(ValueError):
    """A block that should be filled is missing."""


README_WAYS = ("codec", "without compressor", "without decompressor", "fixed units")
"""Ways to store a text that the README's table lists; the card has all."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.documents", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    readme = commands.add_parser("readme", help="fill the README's blocks")
    readme.add_argument("--no-demo", action="store_true", help="leave the demo's output as it is")
    readme.add_argument("--check", action="store_true", help="write nothing; fail when the tables are out of date")
    cards = commands.add_parser("card", help="write the model cards of codec folders")
    cards.add_argument("models", nargs="+", type=Path, help="codec folder; its name chooses the results and the words")
    cards.add_argument("--check", action="store_true", help="write nothing; fail when a card is out of date")
    options = parser.parse_args(argv)
    try:
        if options.command == "card":
            return max(write_card(model, options.check) for model in options.models)
        return write_readme(options.check, not options.no_demo)
    except (CardError, ConfigError, WeightsError, DocumentError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def write_card(model: Path, check: bool) -> int:
    # A path such as "." has no name of its own.
    path, text = model / "README.md", card(model.resolve())
    if not check:
        path.write_text(text, encoding="utf-8")
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        print(f"error: {path}: not the card of its files; run python -m bench.documents card {model}", file=sys.stderr)
        return 1
    return 0


def write_readme(check: bool, demo: bool) -> int:
    text = README.read_text(encoding="utf-8")
    filled = fill_block(text, "measured", measured(RESULTS))
    if check:
        if filled != text:
            print(
                "error: README.md: other tables than docs/results; run python -m bench.documents readme",
                file=sys.stderr,
            )
        return int(filled != text)
    if demo:
        ran = [sys.executable, "-m", "ztok_fast.demo"]
        run = subprocess.run(ran, cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8")
        output = "\n".join(line.rstrip() for line in run.stdout.strip().splitlines())
        filled = fill_block(filled, "demo output", f"```text\n{output}\n```")
    README.write_text(filled, encoding="utf-8")
    return 0


def fill_block(text: str, name: str, content: str) -> str:
    """Replace what stands between `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        DocumentError: the block is not there exactly once.
    """
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise DocumentError(f"README: expected one block {name!r}, got {len(pattern.findall(text))}")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def measured(folder: Path) -> str:
    """The tables of the results of `ztok eval` that bear a codec's name, each above the command that made it."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        # Results under other names, such as those of questions, are for docs/evaluation.md.
        if "families" in results and results["codec"]["name"] == path.stem:
            parts.append(_evaluation_section(path.stem, results))
    return "\n\n".join(parts) if parts else "No results file is in `docs/results` yet."


def _evaluation_section(name: str, results: dict) -> str:
    """What `ztok eval` found: the codec, and what it loses without either language model or with units of r tokens."""
    parts = []
    for family, found in results["families"].items():
        rows = [
            [
                f"{row['asked']:g}",
                row["way"],
                *(number(row[name]) for name in ("ratio", "rate", "residual_bits", "efficiency")),
                *(percent(row[name]) for name in ("teacher_forced", "free_running")),
            ]
            for row in found
            if row["way"] in README_WAYS
        ]
        first = found[0]
        headers = ["r", "way", "ratio", "rate", "residual", "η", "teacher-forced", "free-running"]
        parts.append(
            f"**{name}**, {first['documents']} documents of `{family}`, {first['tokens']:,} text tokens; bits per "
            f"token. Own bits without Z-tokens: {number(first['own_bits'])}; log2 of the vocabulary: "
            f"{number(first['vocabulary_bits'])}. [Evaluation](docs/evaluation.md) defines the columns and ways.\n\n"
            + table(headers, rows)
        )
    if "environment" in results:
        parts.append(made_with(results))
    return "\n\n".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
