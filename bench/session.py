"""One run of the benchmark over many cases: checked once, or measured case by case into the results file."""

from __future__ import annotations

import argparse
import sys
import time
import uuid
from pathlib import Path

import torch

from bench import results
from bench.machine import environment, last_cache_bytes, marks, summary
from bench.registry import Chosen
from bench.runner import backends_of, gradient_mode, measure, verify
from bench.tables import milliseconds, percent, table

# Measured before every case, so within a fraction of a second.
SHORT_MARKS = {"cpu": {"seconds": 0.1, "size": 1024}, "cuda": {"seconds": 0.05, "size": 4096, "count": 1 << 28}}
TINY_MARKS = {"seconds": 0.05, "size": 256, "count": 1 << 20}
CHECKED = {"flops": 100e6, "bytes": 20e6}
"""The most work of a case that `check_all` takes."""


def check_all(cases: Chosen, device: torch.device, backends: list[str] | None) -> int:
    """Run and check small cases once per backend, untimed; without names all backends but the reference.

    Returns:
        1 when a backend was wrong or raised, else 0.
    """
    ran, red = 0, []
    for subject, case in cases:
        inputs = subject.make(case, torch.Generator(device).manual_seed(1))
        work = subject.work(case, inputs)
        if any(getattr(work, name) > most for name, most in CHECKED.items()):
            continue
        with gradient_mode(case):
            for own in backends_of(subject, case, [inputs], device, backends):
                if own.calls and (backends is not None or own.name != "reference"):
                    verify(own, subject, case, [inputs])
                    ran += 1
                    if own.status != "ok":
                        red.append(f"WRONG {subject.key(case)}: {own.name}: {own.status}: {own.reason}")
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("\n".join([*red, f"{ran} runs of backends, {len(red)} red"]))
    return int(bool(red))


def measure_all(cases: Chosen, path: Path, device: torch.device, argv: list[str], options: argparse.Namespace) -> int:
    """Measure the cases in turn, and write the results file after each; returns the exit status.

    Raises:
        ResultsError: the file to add to is not one of results.
    """
    found = results.load(path) if path.exists() else results.empty()
    small = TINY_MARKS if options.set == "tiny" else {}
    facts = environment("bench", argv)
    facts |= {"threads": torch.get_num_threads(), "last_cache_bytes": last_cache_bytes(device)}
    facts["marks"] = reached = marks(device, **small)
    run, started, red, done = uuid.uuid4().hex[:12], time.monotonic(), [], 0
    rates = ", ".join(f"{rate:,.0f} GFLOP/s {dtype}" for dtype, rate in reached["mm_gflops"].items())
    print(f"{summary(facts)}\ntorch.mm {rates}; copy {reached['copy_gbs']:,.1f} GB/s read and written", flush=True)
    try:
        for number, (subject, case) in enumerate(cases, 1):
            if options.limit is not None and time.monotonic() - started > options.limit:
                print(f"--limit {options.limit:g}: {len(cases) - number + 1} of {len(cases)} cases were not started")
                break
            print(f"\n[{number}/{len(cases)}] {subject.key(case)}", flush=True)
            if reason := subject.needs(case):
                print(f"skipped: {reason}", flush=True)
                continue
            now = marks(device, **(small or SHORT_MARKS[device.type]))
            entry = measure(subject, case, device, options.seconds, now, options.backends, options.baselines)
            results.put(found, run, facts, {**entry, "run": run})
            results.save(found, path)
            print(case_table(entry), flush=True)
            red += wrong_backends(entry)
            done += 1
    except KeyboardInterrupt:
        print(f"\ninterrupted: {done} of {len(cases)} cases are in {path}", file=sys.stderr)
        return 130
    print(f"\n{done} cases in {time.monotonic() - started:.0f} s, results in {path}")
    for line in red:
        print(line, file=sys.stderr)
    return int(bool(red))


def wrong_backends(entry: dict) -> list[str]:
    """Backends of a results entry whose answer was wrong or that raised: what makes the command fail."""
    return [
        f"WRONG {entry['key']}: {own['name']}: {own['status']}: {own['reason']}"
        for own in entry["implementations"]
        if own["kind"] == "backend" and own["status"] in ("wrong", "failed")
    ]


def case_table(entry: dict) -> str:
    """Every implementation of one case for the terminal, the preferred backend marked, wrong ones without a time."""
    ours, rows = results.default_backend(entry), []
    for own in entry["implementations"]:
        name = own["name"] + (" *" if own.get("default") else "")
        name += f", threads: {own['threads']}" if own.get("threads") else ""
        if own["status"] == "ok":
            took, graph = own["seconds"], own.get("graph_seconds")
            ratio = f"  {results.seconds(own) / results.seconds(ours):.2f}×" if ours else ""
            times = [milliseconds(took["median"]), milliseconds(took["min"])]
            times.append(milliseconds(graph["median"]) if graph else "–")
            rates = [f"{own['gflops']:.1f}" if entry["work"]["flops"] else "–", f"{own['gbs']:.1f}"]
            rows.append([name, own["kind"], *times, *rates, percent(own["roofline"]) + ratio])
        elif own["status"] != "skipped" or own["kind"] == "backend":
            rows.append([name, own["kind"], f"{own['status']}: {own['reason']}"[:60], *["–"] * 5])
    headers = ["implementation", "", "median, ms", "min, ms", "graph, ms", "GFLOP/s", "GB/s", "roofline, time / ours"]
    return table(headers, rows)
