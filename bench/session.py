"""One run of the benchmark over many cases: marks first, then case by case into the results file."""

from __future__ import annotations

import argparse
import sys
import time
import uuid
from pathlib import Path

import torch

from bench import results
from bench.machine import facts, marks, summary
from bench.registry import Chosen
from bench.runner import backends_of, gradient_mode, measure, verify, wrong_backends
from bench.tables import percent, table

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
    torch.backends.cuda.matmul.allow_tf32 = False
    ran, red = 0, []
    for subject, case in cases:
        inputs = subject.make(case, torch.Generator(device).manual_seed(1))
        work = subject.work(case, inputs)
        if all(getattr(work, name) <= most for name, most in CHECKED.items()):
            with gradient_mode(case):
                for own in backends_of(subject, case, [inputs], device, backends):
                    if own.calls and (backends is not None or own.name != "reference"):
                        verify(own, subject, case, [inputs])
                        ran += 1
                        if own.status != "ok":
                            red.append(f"{subject.key(case)}: {own.name}: {own.status}: {own.reason}")
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("\n".join([*(f"WRONG {line}" for line in red), f"{ran} runs of backends, {len(red)} red"]))
    return int(bool(red))


class SessionError(ValueError):
    """The run cannot be made as asked."""


class Session:
    """Measures cases and keeps the file up to date after each."""

    def __init__(self, path: Path, device: torch.device, threads: int, argv: list[str], options: argparse.Namespace):
        """Read the file to add to and measure the marks.

        Raises:
            SessionError: no such device; results.ResultsError: the file is not one of results.
        """
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
            raise SessionError(f"device: expected cpu or an available CUDA device, got {device}")
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32, for baselines and marks too
        self.path, self.device, self.options = path, device, options
        self.results = results.load(path) if path.exists() else results.empty()
        self.environment = facts(argv, threads, device)
        self.small = TINY_MARKS if options.set == "tiny" else {}
        self.environment["marks"] = marks(device, **self.small)
        self.run_id = uuid.uuid4().hex[:12]

    def measure_all(self, cases: Chosen) -> int:
        """Measure the cases in turn; returns the exit status."""
        reached, options = self.environment["marks"], self.options
        rates = ", ".join(f"{rate:,.0f} GFLOP/s {dtype}" for dtype, rate in reached["mm_gflops"].items())
        print(summary(self.environment))
        print(f"torch.mm {rates}; copy {reached['copy_gbs']:,.1f} GB/s read and written", flush=True)
        started, red, done = time.monotonic(), [], 0
        try:
            for number, (subject, case) in enumerate(cases, 1):
                place = f"\n[{number}/{len(cases)}]"
                if options.limit is not None and time.monotonic() - started > options.limit:
                    print(
                        f"--limit {options.limit:g}: {len(cases) - number + 1} of {len(cases)} cases were not started"
                    )
                    break
                if reason := subject.needs(case):
                    print(f"{place} {subject.key(case)}: skipped: {reason}", flush=True)
                    continue
                now = marks(self.device, **(self.small or SHORT_MARKS[self.device.type]))
                own = (self.device, options.seconds, now, options.backends, options.baselines)
                entry = measure(subject, case, *own, say=lambda text, place=place: print(place, text, flush=True))
                entry["run"] = self.run_id
                results.put(self.results, self.run_id, self.environment, entry)
                results.save(self.results, self.path)
                print(case_table(entry), flush=True)
                red += wrong_backends(entry)
                done += 1
        except KeyboardInterrupt:
            print(f"\ninterrupted: {done} of {len(cases)} cases are in {self.path}", file=sys.stderr)
            return 130
        print(f"\n{done} cases in {time.monotonic() - started:.0f} s, results in {self.path}")
        for line in red:
            print(f"WRONG {line}", file=sys.stderr)
        return 1 if red else 0


def case_table(entry: dict) -> str:
    """Every implementation of one case for the terminal, the preferred backend marked, wrong ones without a time."""
    ours, rows = results.default_backend(entry), []
    for own in entry["implementations"]:
        name = own["name"] + (" *" if own.get("default") else "")
        name += f", {threads} thread{'s' if threads > 1 else ''}" if (threads := own.get("threads")) else ""
        if own["status"] != "ok":
            if own["status"] != "skipped" or own["kind"] == "backend":
                rows.append([name, own["kind"], f"{own['status']}: {own['reason']}"[:60], *["–"] * 5])
            continue
        took, graph = own["seconds"], own.get("graph_seconds")
        ratio = f"  {results.seconds(own) / results.seconds(ours):.2f}×" if ours else ""
        times = [milliseconds(t) for t in (took["median"], took["min"])]
        times.append(milliseconds(graph["median"]) if graph else "–")
        flops = f"{own['gflops']:.1f}" if entry["work"]["flops"] else "–"
        rows.append([name, own["kind"], *times, flops, f"{own['gbs']:.1f}", percent(own["roofline"]) + ratio])
    headers = ["implementation", "", "median, ms", "min, ms", "graph, ms", "GFLOP/s", "GB/s", "roofline, time / ours"]
    found, now = table(headers, rows), entry["marks"]
    if entry["disturbance"]:
        reached = f"torch.mm {now['mm_gflops']['float32']:,.0f} GFLOP/s, copy {now['copy_gbs']:,.1f} GB/s"
        found = f"others had {percent(results.disturbed(entry))} of the processors; {reached}\n{found}"
    return found


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 1e-3 else f"{value:.2e}"
