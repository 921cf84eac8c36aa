"""Writes docs/performance.md from the benchmark results in docs/results.

python -m bench.performance            write it
python -m bench.performance --check    exit status 1 when the document is not that of the results
"""

from __future__ import annotations

import sys

from bench import results
from bench.machine import ROOT, summary
from bench.registry import OPS, RUNS
from bench.tables import milliseconds, percent, table

DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "docs" / "results"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
HEAD = """# Performance

Written by `python -m bench.performance` from the results files in `docs/results`; do not edit. How things are measured,
and how to measure them again: [benchmarks.md](benchmarks.md). Ours, in bold, is always the backend that the op chooses
by itself. Every case was verified against a float64 answer before it was timed. Times are medians in ms, on a GPU those
of graph replays where the call can be captured. Where a baseline is faster than ours, the row says **slower**."""


def main(argv: list[str] | None = None) -> int:
    try:
        text = document({device: results.load_all(RESULTS.glob(f"bench*-{device}.json")) for device in DEVICES})
    except results.ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if (sys.argv[1:] if argv is None else argv) == ["--check"]:
        same = DOCUMENT.is_file() and DOCUMENT.read_text(encoding="utf-8") == text
        if not same:
            print(f"error: {DOCUMENT} is not that of the results; run python -m bench.performance", file=sys.stderr)
        return int(not same)
    DOCUMENT.write_text(text, encoding="utf-8")
    return 0


def document(found: dict[str, dict]) -> str:
    """The whole document from results by device type."""
    parts = [HEAD]
    for device, name in DEVICES.items():
        own = found[device]
        parts += [f"## Measured on the {name}", *(device_part(device, own) if own["cases"] else ["Not measured."])]
    return "\n\n".join(parts) + "\n"


def device_part(device: str, found: dict) -> list[str]:
    """Machine, plots and the tables of all ops on one device."""
    figures = [f"figures/bench-{device}-{name}.png" for name in ("nearest", "roofline")]
    drawn = [f"![{path}]({path})" for path in figures if (DOCUMENT.parent / path).is_file()]
    subjects = {**OPS, **RUNS}
    names = sorted({case["op"] for case in found["cases"]})
    tables = [op_part(subjects[name], [case for case in found["cases"] if case["op"] == name]) for name in names]
    return [runs_text(found), *drawn, *tables]


def runs_text(found: dict) -> str:
    """What every run of the file was made with."""
    lines = []
    for name, facts in found["runs"].items():
        marks, cases = facts["marks"], sum(case["run"] == name for case in found["cases"])
        rates = ", ".join(f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in marks["mm_gflops"].items())
        set_ones = ", ".join(f"{key}={value}" for key, value in sorted(facts["variables"].items()) if value is not None)
        lines.append(
            f"- {cases} case{'s' * (cases > 1)}, {facts['date'][:10]}: `{facts['command']}`; {summary(facts)}; "
            f"{set_ones}; marks: torch.mm of {marks['mm_size']}² {rates}, copy {marks['copy_gbs']:,.1f} GB/s"
        )
    return "\n".join(lines)


def op_part(subject, cases: list[dict]) -> str:
    """Heading, table and notes of one op."""
    entries = [(case, entry) for case in cases for entry in case["implementations"]]
    timed = {entry["name"]: entry["kind"] for _, entry in entries if entry["status"] == "ok"}
    known = {baseline.name for baseline in subject.baselines}
    names = [name for name, kind in timed.items() if kind == "backend" or name in known]
    rows = []
    for case in cases:
        ours, best = results.default_backend(case), results.best_baseline(case)
        ratio = results.seconds(best) / results.seconds(ours) if ours and best else None
        rows.append([
            *case["shape"].values(),
            case["dtype"].replace("bfloat", "bf").replace("float", "fp"),
            "f" if case["direction"] == "forward" else "f+b",
            *(_time(results.measured(case, name)) for name in names),
            percent(ours["roofline"]) if ours else "–",
            "–" if ratio is None else f"{ratio:.2f}×{' **slower**' if ratio < 1 else ''}",
        ])  # fmt: skip
    headers = [*cases[0]["shape"], "dtype", "pass", *names, "of roofline", "best baseline / ours"]
    parts = [f"### {subject.name}", table(headers, rows)]
    notes = [f"- {b.name}{' (a mark)' * (b.kind == 'mark')}: {b.note}" for b in subject.baselines if b.name in names]
    missing = sorted({f"{entry['name']} ({entry['reason']})" for _, entry in entries if entry["status"] == "missing"})
    notes += [f"- not measured: {name}" for name in missing]
    notes += [
        f"- without a speed: {case['key']}: {entry['name']}: {entry['status']}: {entry['reason']}"
        for case, entry in entries
        if entry["status"] in ("wrong", "failed")
    ]
    if any(entry.get("threads") == 1 for _, entry in entries):
        notes.append("- ¹ with one thread, where it was faster than with all; every implementation was tried with both")
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts)


def _time(entry: dict | None) -> str:
    if entry is None:
        return "–"
    took = milliseconds(results.seconds(entry)) + (" ¹" if entry.get("threads") == 1 else "")
    return f"**{took}**" if entry.get("default") else took


if __name__ == "__main__":
    raise SystemExit(main())
