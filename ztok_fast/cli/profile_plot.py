"""The figure of `ztok bench --plot`: all ways beside one another, and the stages of the codec's own."""

from __future__ import annotations

from pathlib import Path


def draw(result: dict, path: Path) -> None:
    """Write a PNG; needs matplotlib and no display."""
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
