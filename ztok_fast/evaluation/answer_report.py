"""Answers about several families of texts as JSON values and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ztok_fast.evaluation.answers import evaluate_answers
from ztok_fast.evaluation.contexts import ANSWER_WAYS
from ztok_fast.evaluation.questions import Item
from ztok_fast.evaluation.readers import reader_of
from ztok_fast.evaluation.report import describe, number, percent, table

if TYPE_CHECKING:
    from ztok_fast.codec.base_model import BaseModel
    from ztok_fast.codec.codec import ZTokCodec


def evaluate_question_families(
    codec: ZTokCodec,
    families: Mapping[str, Sequence[Item]],
    ratios: Sequence[float],
    ways: Sequence[str] | None = None,
    reader: str | BaseModel | ZTokCodec | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """`evaluate_answers` of every family at every ratio.

    Returns:
        What a JSON file holds: ``codec`` and, for every family, ``families[name]``, a list of rows (`AnswerScore`).
    """
    asked = reader_of(reader, codec)
    found = {
        name: [
            score.to_dict()
            for ratio in ratios
            for score in evaluate_answers(codec, items, ratio, reader=asked, ways=ways, progress=progress)
        ]
        for name, items in families.items()
    }
    return {"codec": describe(codec), "families": found}


def markdown(results: dict) -> str:
    """One table for every family."""
    parts = []
    for name, rows in results["families"].items():
        parts += [f"## {name}", f"{rows[0]['items']:,} questions.", _table(rows)] if rows else []
    return "\n\n".join([*parts, _LEGEND]) + "\n"


_LEGEND = (
    "Positions: rows that stand for a text, on average. In brackets: 95 % of the bootstrap. Of full: F1 as a share of "
    "the full text's, by readers on the same base. docs/evaluation.md defines every column and way."
)


def _table(rows: Sequence[dict]) -> str:
    header = ["r", "way", "reader", "positions", "F1", "95 %", "exact match", "of full", "95 %", "same text"]
    cells = []
    for row in sorted(rows, key=lambda row: (row["asked"], ANSWER_WAYS.index(row["way"]))):
        start = [f"{row['asked']:g}", row["way"], row["reader"].split("/")[-1], number(row["positions"], 1)]
        bounds = [_bounds(row, name) for name in ("f1", "of_full")]
        found = [percent(row[name]) for name in ("f1", "exact_match", "of_full", "same_texts")]
        cells.append([*start, found[0], bounds[0], found[1], found[2], bounds[1], found[3]])
    return table(header, cells, left=3)


def _bounds(row: dict, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "–" if low is None else f"[{100 * low:.1f}, {100 * high:.1f}]"
