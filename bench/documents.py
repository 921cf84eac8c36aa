"""Writes measured numbers into the README and the model cards, so that none is typed by hand.

    python -m bench.documents readme              run the demo, then fill the README's blocks from docs/results/*.json
    python -m bench.documents readme --no-demo    only the tables
    python -m bench.documents readme --check      exit status 1 when the tables are not those of the results
    python -m bench.documents card runs/smollm2 ztok_fast/models/ztok-smollm2-135m docs/results/ztok-smollm2-135m.json

A card's own words are in `bench/cards/<name>.md`, between lines of dashes: what it is, how it was trained, its limits.
The run's metrics are copied beside the card, so that it can be written again from the repository alone, with the
codec's folder in place of the run's.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path

from bench.curves import accuracy_table, length_table
from bench.machine import ROOT, summary
from bench.tables import evaluation_cells, number, percent, table

README, RESULTS, CARDS = ROOT / "README.md", ROOT / "docs" / "results", ROOT / "bench" / "cards"
TEMPLATE = CARDS / "template.md"
METRICS = "metrics.jsonl"
HISTORY = 8
"""Most rows of a card's training table."""


class DocumentError(ValueError):
    """A block that should be filled, or a file that a document is written from, is missing or does not fit."""


README_WAYS = ("codec", "without compressor", "without decompressor", "fixed units")
"""Ways to store a text that the README's table lists; the card has all."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.documents", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    readme = commands.add_parser("readme", help="fill the README's blocks")
    readme.add_argument("--no-demo", action="store_true", help="leave the demo's output as it is")
    readme.add_argument("--check", action="store_true", help="write nothing; fail when the tables are out of date")
    card = commands.add_parser("card", help="write a codec's model card")
    card.add_argument("run", help=f"folder with the training run's {METRICS}")
    card.add_argument("model", help="codec folder that receives README.md; its name chooses the words")
    card.add_argument("evaluation", help="JSON of bench.curves for this codec")
    options = parser.parse_args(argv)
    try:
        if options.command == "card":
            print(write_card(Path(options.run), Path(options.model), Path(options.evaluation)))
            return 0
        return write_readme(options.check, not options.no_demo)
    except (DocumentError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


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
    """The tables of every results file in a folder, each under the command that made it."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        if "points" in results:
            parts.append(_curve_section(results))
        elif "families" in results:
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
                number(row["ratio"]),
                number(row["rate"]),
                number(row["residual_bits"]),
                number(row["efficiency"]),
                percent(row["teacher_forced"]),
                percent(row["free_running"]),
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
    return "\n\n".join(parts)


def _curve_section(results: dict) -> str:
    """Accuracy with all residual levels, against fixed units and against no Z-tokens at all."""
    levels, base = max(point["levels"] for point in results["points"]), results["base"]
    rows = []
    for p in results["points"]:
        if p["levels"] == levels:
            *accuracies, ratio, rate = evaluation_cells(p)
            rows.append([f"{p['budget']:g}", p["units"], ratio, rate, *accuracies])
    rows.append(["–", "no Z-tokens", "–", number(base["bits_per_token"]), percent(base["accuracy"]), "–"])
    headers = ["budget", "units", "ratio", "rate, bits/token", "teacher-forced", "free-running"]
    return (
        f"**{results['codec']['name']}**, {data_sentence(results['data'])}. The last row is the base model without "
        "Z-tokens: its rate is the text's own bits per token on the same segments, the bound on an exact rate.\n\n"
        f"{table(headers, rows)}\n\n{_made_with(results)}"
    )


def _made_with(results: dict) -> str:
    return f"Measured by `{results['environment']['command']}` ({summary(results['environment'])})."


def data_sentence(data: dict) -> str:
    files = ", ".join(f"`{name}`" for name in data["files"])
    without = f", without the sources {', '.join(data['exclude_sources'])}" if data["exclude_sources"] else ""
    return f"{data['documents']} documents, {data['tokens']:,} text tokens, of {files}{without}"


def write_card(run: Path, model: Path, evaluation: Path, words: Path | None = None) -> Path:
    """Write a codec folder's `README.md` and its copy of the metrics; returns the card's path.

    Args:
        words: the card's text, by default that of the folder's name.

    Raises:
        DocumentError: a file is missing, or the evaluation is of another codec.
    """
    words, metrics = words or CARDS / f"{model.name}.md", run / METRICS
    needed = {"codec folder": model / "config.json", "run": metrics, "evaluation": evaluation, "words": words}
    for what, path in needed.items():
        if not path.is_file():
            raise DocumentError(f"{what}: expected the file {path}, got none")
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    results = json.loads(evaluation.read_text(encoding="utf-8"))
    if results["codec"]["name"] != model.name:
        raise DocumentError(f"{evaluation}: expected results of {model.name}, got those of {results['codec']['name']}")
    if metrics.resolve() != (model / METRICS).resolve():
        shutil.copyfile(metrics, model / METRICS)
    own = [path for path in sorted(model.rglob("*")) if path.is_file() and path.name not in ("README.md", METRICS)]
    sizes = [[path.relative_to(model).as_posix(), f"{path.stat().st_size:,}"] for path in own]
    about, notes, limits = (part.strip() for part in words.read_text(encoding="utf-8").split("---\n"))
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    fields = {
        "name": model.name,
        "about": about,
        "notes": f"{notes}\n\n" if notes else "",
        "limits": limits,
        "files": table(["file", "bytes"], [*sizes, ["all", f"{sum(path.stat().st_size for path in own):,}"]]),
        "settings": table(["setting", "value"], [[name, str(value)] for name, value in settings.items()]),
        "training": training_table(rows),
        "accuracy": accuracy_table(results),
        "lengths": length_table(results),
        "command": results["environment"]["command"],
        "machine": summary(results["environment"]),
        "data": data_sentence(results["data"]),
    }
    card = model / "README.md"
    card.write_text(string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fields), encoding="utf-8")
    return card


def training_table(rows: list[dict]) -> str:
    """The evaluations during training, thinned to a few, and the last step's codebook use.

    Raises:
        DocumentError: the run has no step.
    """
    if not rows:
        raise DocumentError("metrics: expected at least one step, got none")
    first, last = rows[0], rows[-1]
    evaluated = [row for row in rows if row.get("eval")]
    if not evaluated:
        return (
            f"The run ended after {last['step']:,} steps, before its first evaluation. On its training batches "
            f"{percent(first['accuracy'])} of the tokens were right at the first step and "
            f"{percent(last['accuracy'])} at the last, given the true prefix (budgets mixed)."
        )
    thinned = evaluated[::-1][:: -(-len(evaluated) // HISTORY)][::-1]
    evaluations = [(row["step"], *own) for row in thinned for own in row["eval"].items()]
    cells = [[step, budget, *evaluation_cells(own)] for step, budget, own in evaluations if budget != "base"]
    headers = ["step", "budget", "teacher-forced", "free-running", "ratio", "rate, bits/token"]
    alive = ", ".join(str(count) for count in last["codes_alive"])
    spread = ", ".join(f"{value:.0f}" for value in last["perplexity"])
    use = f"Last step: {last['step']:,}. Codes in use, level by level: {alive}; perplexity of their use: {spread}."
    return f"{table(headers, cells)}\n\n{use}"


if __name__ == "__main__":
    raise SystemExit(main())
