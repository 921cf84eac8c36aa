"""Writes docs/performance.md from the benchmark results.

python -m bench.performance            from bench-cpu.json, bench-codec-cpu.json and their like of a GPU, as far as
                                       they are in docs/results
python -m bench.performance --check    exit status 1 when the document is not that of the results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

from bench import results
from bench.machine import ROOT, summary
from bench.registry import OPS, RUNS
from bench.session import milliseconds
from bench.tables import percent, table
from bench.targets import TARGETS, judge

DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "docs" / "results"
FILES = {
    device: (RESULTS / f"bench-{device}.json", RESULTS / f"bench-codec-{device}.json") for device in ("cpu", "cuda")
}
"""Of the ops and of whole runs of the codec."""
NAMES = {"cpu": "CPU", "cuda": "GPU"}
DISTURBED = 0.1
FIGURES = {"nearest": "Time of the nearest-code search", "roofline": "Roofline of all ops"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.performance", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the document is out of date")
    parser.add_argument("--targets", action="store_true", help="print the verdicts on the targets and write nothing")
    parser.add_argument("--out", default=str(DOCUMENT), help="document to write")
    for device, paths in FILES.items():
        parser.add_argument(f"--{device}", nargs="+", default=paths, metavar="FILE", help="results files")
    options = parser.parse_args(argv)
    try:
        found = {device: own for device in FILES if (own := results.load_all(getattr(options, device)))}
        if options.targets:
            print("\n\n".join(target_table(device, own["cases"]) for device, own in found.items()))
            return 0
        text = document(found)
    except (results.ResultsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    out = Path(options.out)
    if options.check:
        same = out.is_file() and out.read_text(encoding="utf-8") == text
        if not same:
            print(f"error: {out} is not that of the results; run python -m bench.performance", file=sys.stderr)
        return int(not same)
    out.write_text(text, encoding="utf-8")
    print(f"{out}: {sum(len(own['cases']) for own in found.values())} cases")
    return 0


def document(found: dict[str, dict]) -> str:
    """The whole document.

    Args:
        found: results by device type; a device without results is said to be not measured.
    """
    cases = {device: found.get(device, results.empty())["cases"] for device in FILES}
    parts = [
        "# Performance",
        "Written by `python -m bench.performance` from the results files in `docs/results`; do not edit. How things "
        "are measured, and how to measure them again: [benchmarks.md](benchmarks.md). Ours is always the backend that "
        "the op chooses by itself. Every case was verified against a float64 answer before it was timed. Times are "
        "medians in ms, on a GPU those of graph replays where the call can be captured.",
        "## Targets on the CPU (fp32, two threads)",
        target_table("cpu", cases["cpu"]),
        "## Targets on an H100",
        target_table("cuda", cases["cuda"]),
        "A target is met when every measured shape meets it, those with very few rows included, where the fixed cost "
        "of a call (checks, dispatch) is most of the time. A single document, which has nothing to pad or to batch, "
        "decides no target of compress and decompress.",
    ]
    for device, own in cases.items():
        parts += [
            f"## Measured on the {NAMES[device]}",
            *(device_part(device, found[device]) if own else ["Not measured."]),
        ]
    return "\n\n".join(parts) + "\n"


def target_table(device: str, cases: list[dict]) -> str:
    """One row per target of a device, with what was measured and whether it is met."""
    verdicts = [judge(target, cases) for target in TARGETS if target.device == device]
    rows = [[own.target.op, own.target.text, own.measured(), own.said()] for own in verdicts]
    return table(["op", "target", "measured", "verdict"], rows)


def device_part(device: str, found: dict) -> list[str]:
    """Machine, plots and the tables of all ops on one device."""
    drawn = {title: f"figures/bench-{device}-{name}.png" for name, title in FIGURES.items()}
    figures = [f"![{title}]({path})" for title, path in drawn.items() if (DOCUMENT.parent / path).is_file()]
    names = sorted({case["op"] for case in found["cases"]})
    tables = [op_part({**OPS, **RUNS}[name], [c for c in found["cases"] if c["op"] == name]) for name in names]
    lost, shares = sum(losses for _, losses in tables), [results.disturbed(case) for case in found["cases"]]
    text = f"{len(shares)} cases; in {lost} of them a baseline is faster than ours: they are marked **slower**."
    if any(shares):
        text += (
            f" While a case was timed, other processes and the machine's host had {percent(median(shares))} of the "
            f"processors (median; {percent(max(shares))} at most). Cases with more than {percent(DISTURBED)} carry a "
            "†: implementations took turns there too, but one with several threads suffers more than one with one."
        )
    return [runs_text(found), text, *(["\n\n".join(figures)] if figures else []), *(own for own, _ in tables)]


def runs_text(found: dict) -> str:
    """What every run of the file was made with."""
    lines = []
    for name, facts in found["runs"].items():
        marks, cases = facts["marks"], sum(case["run"] == name for case in found["cases"])
        rates = ", ".join(f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in marks["mm_gflops"].items())
        variables = ", ".join(
            f"{key}={value}" for key, value in sorted(facts["variables"].items()) if value is not None
        )
        lines.append(
            f"- {cases} cases, {facts['date'][:10]}: `{facts['command']}`; {summary(facts)}; {variables}; marks: "
            f"torch.mm of {marks['mm_size']}² {rates}, copy {marks['copy_gbs']:,.1f} GB/s"
        )
    return "\n".join(lines)


def op_part(subject, cases: list[dict]) -> tuple[str, int]:
    """Heading, table and notes of one op; and on how many of its cases a baseline is faster."""
    entries = [(case, entry) for case in cases for entry in case["implementations"]]
    backends = {entry["name"] for _, entry in entries if entry["kind"] == "backend"}
    names = list(dict.fromkeys(entry["name"] for _, entry in entries if entry["status"] == "ok"))
    names.sort(key=lambda name: name not in backends)  # backends first, otherwise as they came
    sizes = list(cases[0]["shape"])
    rows, losses = [], 0
    for case in cases:
        ours, other = results.default_backend(case), results.best_baseline(case)
        cells = [case["shape"].get(size, "–") for size in sizes]
        cells += [_short(case["dtype"]), "f" if case["direction"] == "forward" else "f+b"]
        cells += [_cell(case, name) for name in names]
        cells.append(percent(ours["roofline"]) if ours else "–")
        ratio = results.seconds(other) / results.seconds(ours) if ours and other else None
        lost = ratio is not None and ratio < 1
        losses += lost
        dagger = " †" if results.disturbed(case) > DISTURBED else ""
        cells.append(("–" if ratio is None else f"{ratio:.2f}×{' **slower**' if lost else ''}") + dagger)
        rows.append(cells)
    headers = [*sizes, "dtype", "pass", *names, "of roofline", "best baseline / ours"]
    kinds = {"mark": " (a mark)", "variant": " (our own ops)"}
    used = [f"- {b.name}{kinds.get(b.kind, '')}: {b.note}" for b in subject.baselines if b.name in names]
    missing = sorted({f"{entry['name']} ({entry['reason']})" for _, entry in entries if entry["status"] == "missing"})
    notes = [
        f"- {case['key']}: {entry['name']}: {entry['status']}: {entry['reason']}"
        for case, entry in entries
        if entry["status"] in ("wrong", "failed")
    ]
    parts = [f"### {subject.name}", table(headers, rows)]
    if used:
        parts.append("\n".join(used))
    if any(entry.get("threads") == 1 for _, entry in entries):
        parts.append("¹ with one thread, where it was faster than with all; every implementation was tried with both.")
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    if notes:
        parts += ["Without a speed, because the check failed:", "\n".join(notes)]
    return "\n\n".join(parts), losses


def _short(dtype: str) -> str:
    return dtype.replace("float", "fp").replace("bfp", "bf")


def _cell(case: dict, name: str) -> str:
    for entry in case["implementations"]:
        if entry["name"] == name:
            if entry["status"] == "ok":
                took = milliseconds(results.seconds(entry)) + (" ¹" if entry.get("threads") == 1 else "")
                return f"**{took}**" if entry.get("default") else took
            return entry["status"] if entry["status"] in ("wrong", "failed") else "–"
    return "–"


if __name__ == "__main__":
    raise SystemExit(main())
