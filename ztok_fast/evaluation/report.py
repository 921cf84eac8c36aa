"""Evaluations of several families of text as JSON values and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ztok_fast.evaluation.evaluate import CODEC, WAYS, compare, ways_of
from ztok_fast.evaluation.sample import Sample

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec


def evaluate_families(
    codec: ZTokCodec,
    families: Mapping[str, Sequence[str]],
    ratios: Sequence[float],
    wanted: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """The evaluations of every family of texts, at every ratio, of every way to store them.

    Args:
        families: texts by name; wanted, progress: as in `compare`.

    Returns:
        What a JSON file holds: ``codec`` and, for every family, ``families[name]``, a list of rows (`Evaluation`).

    Raises:
        ValueError: a family without text, or a ratio that the codec cannot give.
    """
    ratios = [codec.config.check_ratio(ratio) for ratio in ratios]
    found = {}
    for name, texts in families.items():
        try:
            sample = Sample.of_texts(codec, texts)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        found[name] = [e.to_dict() for e in compare(codec, sample, ratios, wanted, progress)]
    return {"codec": describe(codec), "families": found}


def describe(codec: ZTokCodec) -> dict:
    """What tells one codec from another, for results."""
    return {
        "fingerprint": codec.fingerprint,
        "base_model": codec.base.name,
        "emission": codec.config.emission,
        "engine": codec.engine,
    }


def ways_to_run(codec: ZTokCodec, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The ways that are asked for, in the order of `WAYS`; ``None`` for all that the codec has.

    Raises:
        ValueError: a way that the codec does not have.
    """
    have = ways_of(codec)
    for way in wanted or ():
        if way not in have:
            raise ValueError(f"ways: expected some of {', '.join(have)}, got {way!r}")
    return tuple(way for way in have if wanted is None or way in wanted)


def markdown(results: dict) -> str:
    """All results: one table of the codec as it is over all families, and one table for every family."""
    families = results["families"]
    parts = []
    if len(families) > 1 and any(row["way"] == CODEC for rows in families.values() for row in rows):
        parts += ["## All families", _overview(families)]
    for name, rows in families.items():
        parts += [f"## {name}", _caption(rows[0]), _table(rows)] if rows else []
    return "\n\n".join([*parts, _LEGEND]) + "\n"


_LEGEND = (
    "Bits are per text token. η = (H₀ − residual) / rate. Rate: everything the decompressor is told, as "
    "stored; plain: with every code at its full width. Near: documents of 150 tokens or more whose ratio is within "
    "10 % of the one asked for. docs/evaluation.md defines every column and way."
)


def _caption(row: dict) -> str:
    documents = "document" if row["documents"] == 1 else "documents"
    return (
        f"{row['documents']:,} {documents}, {row['segments']:,} segments, {row['tokens']:,} tokens, "
        f"{row['bytes']:,} bytes. Own bits H₀: {row['own_bits']:.2f}; log2(vocabulary): {row['vocabulary_bits']:.2f}."
    )


def _table(rows: Sequence[dict]) -> str:
    header = ["r", "way", "rate", "plain", "residual", "η", "rate + residual", "teacher-forced", "free-running"]
    header += ["BLEU", "exact segments", "told", "ratio", "near"]
    cells = []
    for row in sorted(rows, key=lambda row: (row["asked"], WAYS.index(row["way"]))):
        bits = [number(row[name]) for name in ("rate", "plain_rate", "residual_bits", "efficiency", "total_bits")]
        accuracy = [percent(row[name]) for name in ("teacher_forced", "free_running")]
        rest = [percent(row["exact_segments"]), percent(row["told"]), number(row["ratio"]), percent(row["near"])]
        cells.append([f"{row['asked']:g}", row["way"], *bits, *accuracy, number(row["bleu"], 1), *rest])
    return table(header, cells, left=2)


def _overview(families: dict[str, list[dict]]) -> str:
    """η and free-running accuracy of the codec as it is, by family and ratio."""
    own = {name: {row["asked"]: row for row in rows if row["way"] == CODEC} for name, rows in families.items()}
    ratios = sorted({ratio for rows in own.values() for ratio in rows})
    header = ["family", "H₀", *(f"{what}, r = {ratio:g}" for ratio in ratios for what in ("η", "right"))]
    cells = []
    for name, rows in own.items():
        line = [name, number(next(iter(rows.values()))["own_bits"] if rows else None)]
        for ratio in ratios:
            row = rows.get(ratio, {})
            line += [number(row.get("efficiency")), percent(row.get("free_running"))]
        cells.append(line)
    return table(header, cells)


# Cells


def number(value: float | None, digits: int = 2) -> str:
    """``value`` with ``digits`` decimals; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share in per cent; a dash where there is none."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that reads well in a terminal; the first ``left`` columns are flush left."""
    lines = [list(header), *map(list, rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    padded = [[c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))] for line in lines]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])
