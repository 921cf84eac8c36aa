"""Tables of measurements as Markdown that also reads well in a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with padded columns; numbers stand to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(headers):
            raise ValueError(f"table: expected rows of {len(headers)} cells, got {len(row)}: {row}")
    widths = [max(3, len(header), *(len(row[i]) for row in cells)) for i, header in enumerate(headers)]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(headers))]
    lines = [_line(headers, widths, right)]
    lines.append("| " + " | ".join("-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right)) + " |")
    return "\n".join(lines + [_line(row, widths, right) for row in cells])


def print_rows(rows: Iterable[dict]) -> list[dict]:
    """Print rows as they are found, columns by the keys of the first; returns them."""
    found: list[dict] = []
    for row in rows:
        if not found:
            headers = [key.replace("_per_", "/").replace("_", " ") for key in row]
            print("| " + " | ".join(headers) + " |\n|" + " --- |" * len(row))
        cells = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values())
        print("| " + " | ".join(cells) + " |", flush=True)
        found.append(row)
    return found


def number(value: float | None, digits: int = 2) -> str:
    """A number with ``digits`` decimals; a dash where there is none (an empty family's ratio)."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 1e-3 else f"{value:.2e}"


def _line(row, widths, right) -> str:
    return "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)) + " |"


def _is_number(text: str) -> bool:
    return bool(text) and text[0] in "-–0123456789"
