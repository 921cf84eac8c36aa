"""Plots of an evaluation: efficiency and accuracy against rate."""

from __future__ import annotations

from pathlib import Path

from ztok_fast.evaluation.evaluate import CODEC, WAYS

LOWEST = -0.3
"""Where the axis of efficiency begins at the latest: below 0 a way is worse than no Z-tokens, however much."""


def draw(results: dict, path: Path) -> None:
    """Write one figure, PNG or SVG by the file's name; needs matplotlib.

    A row for every family: efficiency against rate with its bound, and accuracy against rate with the text's own bits
    and the bits of a token that is written down as it is.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = {name: rows for name, rows in results["families"].items() if rows}
    figure = Figure(figsize=(11, 3.8 * len(families) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, rows) in zip(figure.subplots(len(families), 2, squeeze=False), families.items()):
        _panels(axes, name, rows)
    figure.suptitle("Z-tokens against what remains without a language model", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None} if path.suffix == ".png" else None)


def _panels(axes, name: str, rows: list[dict]) -> None:
    left, right = axes
    for i, way in enumerate(WAYS):
        own = sorted((row for row in rows if row["way"] == way), key=lambda row: row["rate"])
        if not own:
            continue
        rates = [row["rate"] for row in own]
        style = {"color": f"C{i}", "marker": "o", "markersize": 4, "linewidth": 2.2 if way == CODEC else 1.0}
        left.plot(rates, [row["efficiency"] for row in own], label=way, **style)
        right.plot(rates, [row["free_running"] for row in own], label=way, **style)
        if way == CODEC:
            style |= {"linestyle": ":", "linewidth": 1.0}
            right.plot(rates, [row["teacher_forced"] for row in own], label=f"{way}, given the true prefix", **style)
    left.axhline(1.0, color="black", linewidth=1, label="bound: every bit saves one")
    right.axvline(rows[0]["own_bits"], color="black", linewidth=1, label="own bits H₀")
    right.axvline(rows[0]["vocabulary_bits"], color="grey", linewidth=1, linestyle="--", label="log2(vocabulary)")
    left.set(ylabel=f"{name}\nefficiency η", ylim=(max(left.get_ylim()[0], LOWEST), 1.05))
    right.set(ylabel="share of tokens right, free-running", ylim=(0, 1.02))
    for plot in axes:
        plot.set(xlabel="rate, bits per text token")
        plot.set_xlim(left=0)
        plot.grid(alpha=0.3)
        plot.legend(fontsize=6)
