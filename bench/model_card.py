"""Writes a shipped codec's model card from its metrics and its evaluation; no number in it is typed by hand.

The words are in ``bench/cards/<name>.md``. The metrics file is copied beside the weights, so that the card can be
written again from the repository alone:

    python -m bench.model_card runs/mini ztok_fast/models/ztok-mini --evaluation docs/results/ztok-mini.json
    python -m bench.model_card ztok_fast/models/ztok-mini ztok_fast/models/ztok-mini --evaluation docs/results/ztok-mini.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import string
import sys
from pathlib import Path

from bench import environment
from bench.curves import accuracy_table, length_table
from bench.tables import number, percent, table

CARDS = Path(__file__).resolve().parent / "cards"
METRICS = "metrics.jsonl"
HISTORY = 8
"""Most rows of the training table."""


class CardError(ValueError):
    """A file that the card is written from is missing or does not fit."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.model_card", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="folder with the training run's metrics.jsonl")
    parser.add_argument("model", help="codec folder that receives README.md; its name chooses the words")
    parser.add_argument("--evaluation", required=True, metavar="FILE", help="JSON of bench.curves for this codec")
    options = parser.parse_args(argv)
    try:
        print(write_card(Path(options.run), Path(options.model), Path(options.evaluation)))
    except (CardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write_card(run: Path, model: Path, evaluation: Path, words: Path | None = None) -> Path:
    """Write ``README.md`` and ``metrics.jsonl`` into a codec folder; returns the card's path.

    Args:
        words: the card's text, by default that of the folder's name.

    Raises:
        CardError: a file is missing, or the evaluation is of another codec.
    """
    words = words or CARDS / f"{model.name}.md"
    for what, path in (
        ("codec folder", model / "config.json"),
        ("run", run / METRICS),
        ("evaluation", evaluation),
        ("words", words),
    ):
        if not path.is_file():
            raise CardError(f"{what}: expected the file {path}, got none")
    rows = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    results = json.loads(evaluation.read_text(encoding="utf-8"))
    if results["codec"]["name"] != model.name:
        raise CardError(f"evaluation {evaluation}: expected one of {model.name}, got one of {results['codec']['name']}")
    if (run / METRICS).resolve() != (model / METRICS).resolve():
        shutil.copyfile(run / METRICS, model / METRICS)
    fields = {
        "files": files_table(model),
        "settings": settings_table(json.loads((model / "config.json").read_text(encoding="utf-8"))),
        "training": training_table(rows),
        "accuracy": accuracy_table(results),
        "lengths": length_table(results),
        "command": results["environment"]["command"],
        "machine": environment.summary(results["environment"]),
        "data": data_sentence(results["data"]),
    }
    card = model / "README.md"
    card.write_text(string.Template(words.read_text(encoding="utf-8")).substitute(fields), encoding="utf-8")
    return card


def files_table(model: Path) -> str:
    """The codec's files, its own base model's among them, with their sizes."""
    generated = ("README.md", METRICS)
    files = [path for path in sorted(model.rglob("*")) if path.is_file() and path.name not in generated]
    rows = [[path.relative_to(model).as_posix(), f"{path.stat().st_size:,}"] for path in files]
    return table(["file", "bytes"], [*rows, ["all", f"{sum(path.stat().st_size for path in files):,}"]])


def settings_table(config: dict) -> str:
    return table(["setting", "value"], [[name, str(value)] for name, value in config.items()])


def training_table(rows: list[dict]) -> str:
    """The evaluations during training, thinned to a few, and the last step's codebook use.

    Raises:
        CardError: the run has no step.
    """
    if not rows:
        raise CardError("metrics: expected at least one step, got none")
    evaluated = [row for row in rows if row.get("eval")]
    if not evaluated:
        return (
            f"The run ended after {rows[-1]['step']:,} steps, before its first evaluation. On its training batches "
            f"{percent(rows[0]['accuracy'])} of the tokens were right at the first step and "
            f"{percent(rows[-1]['accuracy'])} at the last, given the true prefix (budgets mixed)."
        )
    stride = -(-len(evaluated) // HISTORY)
    cells = []
    for row in evaluated[::-1][::stride][::-1]:
        for budget, values in row["eval"].items():
            if budget != "base":
                cells.append(
                    [
                        row["step"],
                        budget,
                        percent(values["teacher_forced"]),
                        percent(values["free_running"]),
                        number(values["ratio"]),
                        number(values["rate"]),
                    ]
                )
    last = rows[-1]
    headers = ["step", "budget", "teacher-forced", "free-running", "ratio", "rate, bits/token"]
    alive = ", ".join(str(count) for count in last["codes_alive"])
    spread = ", ".join(f"{value:.0f}" for value in last["perplexity"])
    return (
        table(headers, cells)
        + f"\n\nLast step: {last['step']:,}. Codes in use, level by level: {alive}; perplexity of their use: {spread}."
    )


def data_sentence(data: dict) -> str:
    files = ", ".join(f"`{name}`" for name in data["files"])
    without = f", without the sources {', '.join(data['exclude_sources'])}" if data["exclude_sources"] else ""
    return f"{data['documents']} documents, {data['tokens']:,} text tokens, of {files}{without}"


if __name__ == "__main__":
    raise SystemExit(main())
