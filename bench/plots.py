"""Plots of a results file: time against M, V and d of the nearest-code search, and the roofline of all ops."""

from __future__ import annotations

from pathlib import Path

from bench import results

NEAREST_LINES = {"M": {"V": 1024, "d": 128}, "V": {"M": 256, "d": 128}, "d": {"M": 256, "V": 4096}}


def draw(found: dict, folder: Path, device: str) -> list[Path]:
    """Write the plots that the results have cases for; returns their paths. Needs matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = [case for case in found["cases"] if case["device"] == device]
    drawn = []
    for name, figure in (("nearest", _nearest(cases)), ("roofline", _roofline(found, cases))):
        if figure is not None:
            drawn.append(folder / f"bench-{device}-{name}.png")
            figure.savefig(drawn[-1], dpi=130, metadata={"Software": None})
    return drawn


def new_figure(width: float, height: float):
    """A figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _lines(cases, axis, fixed):
    """{implementation: [(size, milliseconds)]} of the fp32 or, where there are none, the bf16 forward cases."""
    for dtype in ("float32", "bfloat16"):
        lines: dict[str, list[tuple[int, float]]] = {}
        for case in cases:
            kind = (case["op"], case["direction"], case["dtype"])
            if kind == ("codebook_assign", "forward", dtype) and fixed.items() <= case["shape"].items():
                for entry in (own for own in case["implementations"] if own["status"] == "ok"):
                    name = f"ztok_fast, {entry['name']}" if entry["kind"] == "backend" else entry["name"]
                    lines.setdefault(name, []).append((case["shape"][axis], 1e3 * results.seconds(entry)))
        if lines:
            return {name: sorted(points) for name, points in lines.items()}
    return {}


def _nearest(cases):
    panels = {axis: _lines(cases, axis, fixed) for axis, fixed in NEAREST_LINES.items()}
    panels = {axis: lines for axis, lines in panels.items() if any(len(points) > 1 for points in lines.values())}
    if not panels:
        return None
    figure = new_figure(4.2 * len(panels), 4.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for plot, (axis, lines) in zip(axes, panels.items()):
        for name, points in lines.items():
            style = {"linewidth": 2.2 if name.startswith("ztok_fast") else 1.0, "marker": "o", "markersize": 4}
            style |= {"color": f"C{names.index(name) % 10}", "linestyle": ":" if name.startswith("mm") else "-"}
            plot.plot(*zip(*points), label=name, **style)
        fixed = ", ".join(f"{name} = {size}" for name, size in NEAREST_LINES[axis].items())
        plot.set(xscale="log", yscale="log", xlabel=axis, ylabel="median time, ms", title=fixed)
        plot.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle("codebook_assign", fontsize=11)
    return figure


def _roofline(found, cases):
    """Left: operations per second against operations per byte. Right: bytes per second of the ops that only move."""
    if not cases:
        return None
    figure = new_figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    marks = found["runs"][cases[-1]["run"]]["marks"]
    for number, name in enumerate(dict.fromkeys(case["op"] for case in cases)):
        timed = [(case["work"], results.default_backend(case)) for case in cases if case["op"] == name]
        timed = [(work, ours) for work, ours in timed if ours is not None]
        counted = [(work["flops"] / work["bytes"], ours["gflops"]) for work, ours in timed if work["flops"]]
        moved = [(work["bytes"] / 1e6, ours["gbs"]) for work, ours in timed if not work["flops"]]
        for plot, points in ((left, counted), (right, moved)):
            if points:
                plot.scatter(*zip(*points), label=name, color=f"C{number % 10}", s=22)
    intensities = [2.0**power for power in range(-3, 12)]
    for dtype, rate in marks["mm_gflops"].items():
        reached = [min(rate, x * marks["copy_gbs"]) for x in intensities]
        style = {"color": "black", "linewidth": 1, "linestyle": "-" if dtype == "float32" else "--"}
        left.plot(intensities, reached, label=f"copy and torch.mm, {dtype}", **style)
    left.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
    right.axhline(marks["copy_gbs"], color="black", linewidth=1, label="a large copy")
    right.set(xscale="log", xlabel="MB read and written", ylabel="GB/s", ylim=(0, None))
    for plot in (left, right):
        plot.grid(alpha=0.3)
        plot.legend(fontsize=7)
    figure.suptitle("Preferred backend of each op, all cases", fontsize=11)
    return figure
