"""The figures of `ztok bench --plot`: all ways and the codec's stages, or the sizes and speeds of compressors."""

from __future__ import annotations

from pathlib import Path

MOST_LETTERS = 28
"""Of the name of a text."""


def draw(result: dict, path: Path) -> None:
    """All ways beside one another, and the stages of the codec's own: a PNG. Needs matplotlib and no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    ways = result["ways"][::-1]
    bars = left.barh([way["name"] for way in ways], [way["tokens_per_second"] for way in ways], color="C7")
    bars[-1].set_color("C0")
    left.bar_label(bars, fmt="{:,.0f}", padding=3)
    left.margins(x=0.25)
    left.set_xlabel(f"{result['unit']} per second")
    stages = result["stages"][::-1]
    bars = right.barh([own["name"] for own in stages], [1e3 * own["seconds"] for own in stages], color="C0")
    right.bar_label(bars, [f"{100 * own['share']:.0f} %" for own in stages], padding=3)
    right.margins(x=0.25)
    right.set_xlabel("milliseconds")
    figure.suptitle(f"{result['command']}, {result['codec']}, engine {result['engine']}", fontsize="medium")
    figure.savefig(path, format="png", dpi=130, metadata={"Software": None})


def draw_files(result: dict, sums: list[dict], path: Path) -> None:
    """Bits per byte by text, and size against the speeds of both directions: a PNG, as `draw`.

    Args:
        sums: `ztok_fast.cli.profile_files.totals` of its rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result["results"]
    labels = list(dict.fromkeys(row["compressor"] for row in rows))
    names = list(dict.fromkeys(row["text"] for row in rows))
    bits = {(row["text"], row["compressor"]): 8 * row["bytes"] / row["size"] for row in rows}
    figure = Figure(figsize=(11, 1.6 + 0.5 * max(5, len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    thick = 0.8 / len(labels)
    for index, label in enumerate(labels):
        places = [place - 0.4 + thick * (index + 0.5) for place in range(len(names))]
        left.barh(places, [bits[name, label] for name in names], thick, label=label, color=f"C{index}")
    left.set_yticks(range(len(names)), [name[:MOST_LETTERS] for name in names])
    left.invert_yaxis()
    left.set_xlabel("bits per byte, whole files")
    for index, row in enumerate(sums):
        speeds = [row["size"] / 1e6 / row[f"{way}_seconds"] for way in ("compress", "decompress")]
        size = 8 * row["bytes"] / row["size"]
        right.plot(speeds, [size, size], color=f"C{index}", linewidth=1)
        right.plot(speeds[:1], [size], "o", color=f"C{index}", label=row["compressor"])
        right.plot(speeds[1:], [size], "o", color=f"C{index}", fillstyle="none")
    right.set_xscale("log")
    right.set_xlabel("MB/s: compress (full), decompress (open)")
    right.set_ylabel("bits per byte, all files")
    right.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=130, metadata={"Software": None})
