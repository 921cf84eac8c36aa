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

from bench.environment import ROOT, summary
from bench.micro import results
from bench.micro.registry import OPS, RUNS
from bench.micro.session import milliseconds
from bench.tables import percent, table
from bench.targets import ELSEWHERE, TARGETS, judge

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
        parser.add_argument(
            f"--{device}", nargs="+", default=paths, metavar="FILE", help=f"results on the {NAMES[device]}"
        )
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
    parts = [
        "# Performance",
        "Written by `python -m bench.performance` from the results files in `docs/results`; do not edit. How things are "
        'measured, and how to measure them again: [benchmarks.md](benchmarks.md). "ours" is always the backend that the '
        "op chooses by itself. Every case was verified against a float64 answer before it was timed. Times are medians "
        "in ms, on a GPU those of graph replays where the call can be captured.",
        "## Targets on the CPU (fp32, two threads)",
        target_table("cpu", found.get("cpu", results.empty())["cases"]),
        "## Targets on an H100",
        target_table("cuda", found.get("cuda", results.empty())["cases"]),
        "A target is met when every measured shape meets it, those with very few rows included, where the fixed cost of "
        "a call (checks, dispatch, the custom op) is most of the time. A single document, which has nothing to pad or to "
        "batch, decides no target of compress and decompress.",
    ]
    for device in FILES:
        parts.append(f"## Measured on the {NAMES[device]}")
        if device not in found or not found[device]["cases"]:
            parts.append("Not measured.")
            continue
        parts += device_part(device, found[device])
    return "\n\n".join(parts) + "\n"


def target_table(device: str, cases: list[dict]) -> str:
    """One row per target of a device, with what was measured and whether it is met."""
    rows = []
    for target in TARGETS:
        if target.device == device:
            verdict = judge(target, cases)
            rows.append([target.op, target.text, verdict.measured(), verdict.said()])
    rows += [[op, text, "not measured here", "–"] for op, text in ELSEWHERE[device]]
    return table(["op", "target", "measured", "verdict"], rows)


def device_part(device: str, found: dict) -> list[str]:
    """Machine, plots and the tables of all ops on one device."""
    parts = [runs_text(found)]
    figures = [
        f"![{title}](figures/bench-{device}-{name}.png)"
        for name, title in FIGURES.items()
        if (DOCUMENT.parent / "figures" / f"bench-{device}-{name}.png").is_file()
    ]
    if figures:
        parts.append("\n\n".join(figures))
    losses = 0
    for name, op in {**OPS, **RUNS}.items():
        cases = [case for case in found["cases"] if case["op"] == name]
        if cases:
            text, lost = op_part(op, cases)
            parts.append(text)
            losses += lost
    shares = [results.disturbed(case) for case in found["cases"]]
    text = f"{len(found['cases'])} cases; in {losses} of them a peer is faster than ours: they are marked **slower**."
    if any(shares):
        text += (
            f" While a case was timed, other processes and the machine's host had {percent(median(shares))} of the "
            f"processors (median; {percent(max(shares))} at most). Cases with more than {percent(DISTURBED)} carry a †: "
            "contenders took turns there too, but a multi-threaded one suffers more than one that uses a single thread."
        )
    parts.insert(1, text)
    return parts


def runs_text(found: dict) -> str:
    """What every run of the file was made with."""
    lines = []
    for name, facts in found["runs"].items():
        marks = facts["marks"]
        cases = sum(case["run"] == name for case in found["cases"])
        rates = ", ".join(f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in marks["mm_gflops"].items())
        variables = ", ".join(
            f"{key}={value}" for key, value in sorted(facts["variables"].items()) if value is not None
        )
        lines.append(
            f"- {cases} cases, {facts['date'][:10]}: `{facts['command']}`; {summary(facts)}; {variables}; marks: torch.mm of "
            f"{marks['mm_size']}² {rates}, copy {marks['copy_gbs']:,.1f} GB/s"
        )
    return "\n".join(lines)


def op_part(op, cases: list[dict]) -> tuple[str, int]:
    """Heading, table and notes of one op; and on how many of its cases a peer is faster."""
    names = list(
        dict.fromkeys(entry["name"] for case in cases for entry in case["contenders"] if entry["status"] == "ok")
    )
    backends = {entry["name"] for case in cases for entry in case["contenders"] if entry["kind"] == "backend"}
    names.sort(key=lambda name: name not in backends)  # backends first, otherwise as they came
    sizes = list(cases[0]["shape"])
    headers = [*sizes, "dtype", "pass", *names, "of roofline", "best peer / ours"]
    rows, losses, notes = [], 0, []
    for case in cases:
        ours, peer = results.default_backend(case), results.best_peer(case)
        cells = [case["shape"].get(size, "–") for size in sizes]
        cells += [
            case["dtype"].replace("float", "fp").replace("bfp", "bf"),
            "f" if case["direction"] == "forward" else "f+b",
        ]
        for name in names:
            cells.append(_cell(case, name))
        cells.append(percent(ours["roofline"]) if ours else "–")
        ratio = results.seconds(peer) / results.seconds(ours) if ours and peer else None
        lost = ratio is not None and ratio < 1
        losses += lost
        dagger = " †" if results.disturbed(case) > DISTURBED else ""
        cells.append(("–" if ratio is None else f"{ratio:.2f}×{' **slower**' if lost else ''}") + dagger)
        rows.append(cells)
        notes += [
            f"{case['key']}: {entry['name']}: {entry['status']}: {entry['reason']}"
            for entry in case["contenders"]
            if entry["status"] in ("wrong", "failed")
        ]
    used = "\n".join(f"- {peer.name}{_kind(peer)}: {peer.note}" for peer in op.peers if peer.name in names)
    missing = sorted(
        {
            f"{entry['name']} ({entry['reason']})"
            for case in cases
            for entry in case["contenders"]
            if entry["status"] == "missing"
        }
    )
    text = f"### {op.name}\n\n{table(headers, rows)}"
    if used:
        text += f"\n\n{used}"
    if any(entry.get("threads") == 1 for case in cases for entry in case["contenders"]):
        text += "\n\n¹ with one thread, where it was faster than with all; every contender was tried with both."
    if missing:
        text += f"\n\nNot measured: {', '.join(missing)}."
    if notes:
        text += "\n\nWithout a speed, because the check was red:\n\n" + "\n".join(f"- {note}" for note in notes)
    return text, losses


def _kind(peer) -> str:
    return {"mark": " (a mark)", "variant": " (our own ops)"}.get(peer.kind, "")


def _cell(case: dict, name: str) -> str:
    for entry in case["contenders"]:
        if entry["name"] == name:
            if entry["status"] == "ok":
                took = milliseconds(results.seconds(entry)) + (" ¹" if entry.get("threads") == 1 else "")
                return f"**{took}**" if entry.get("default") else took
            return entry["status"] if entry["status"] in ("wrong", "failed") else "–"
    return "–"


if __name__ == "__main__":
    raise SystemExit(main())
