"""One run of the benchmark over many cases: marks first, then case by case into the results file."""

from __future__ import annotations

import argparse
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.environment import summary
from bench.micro import results
from bench.micro.case import Case
from bench.micro.machine import facts, marks
from bench.micro.registry import entry as entry_of
from bench.micro.runner import measure, wrong_backends
from bench.tables import percent, table

# Measured before every case, so within a fraction of a second.
SHORT_MARKS = {"cpu": {"seconds": 0.1, "size": 1024}, "cuda": {"seconds": 0.05, "size": 4096, "count": 1 << 28}}


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
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32, for peers and marks too
        self.path, self.device, self.options = path, device, options
        self.results = results.load(path) if path.exists() else results.empty()
        self.environment = facts(argv, threads, device)
        self.small = {"seconds": 0.05, "size": 256, "count": 1 << 20} if options.set == "tiny" else {}
        self.environment["marks"] = marks(device, **self.small)
        self.run_id = uuid.uuid4().hex[:12]

    def measure_all(self, cases: Sequence[Case]) -> int:
        """Measure the cases in turn; returns the exit status."""
        reached = self.environment["marks"]
        rates = ", ".join(f"{rate:,.0f} GFLOP/s {dtype}" for dtype, rate in reached["mm_gflops"].items())
        print(summary(self.environment))
        print(f"torch.mm {rates}; copy {reached['copy_gbs']:,.1f} GB/s read and written", flush=True)
        started, red, done = time.monotonic(), [], 0
        limit = self.options.limit
        try:
            for number, case in enumerate(cases, 1):
                if limit is not None and time.monotonic() - started > limit:
                    print(f"--limit {limit:g}: {len(cases) - number + 1} of {len(cases)} cases were not started")
                    break
                if reason := entry_of(case.op).needs(case):
                    print(f"\n[{number}/{len(cases)}] {case.key}: skipped: {reason}", flush=True)
                    continue
                entry = self.measured(case, f"\n[{number}/{len(cases)}]")
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

    def measured(self, case: Case, place: str) -> dict:
        """The results entry of a case, the least disturbed of up to three where the options ask for quiet."""
        best = None
        for attempt in range(3 if self.options.undisturbed is not None else 1):
            now = marks(self.device, **(self.small or SHORT_MARKS[self.device.type]))
            entry = measure(
                entry_of(case.op),
                case,
                self.device,
                self.options.seconds,
                now,
                self.options.backends,
                self.options.peers,
                say=lambda text: print(f"{place if not attempt else '  again,'} {text}", flush=True),
            )
            if best is None or results.disturbed(entry) < results.disturbed(best):
                best = entry
            if self.options.undisturbed is None or results.disturbed(best) <= self.options.undisturbed:
                break
        return best


def case_table(entry: dict) -> str:
    """All contenders of one case for the terminal, the preferred backend marked, red ones without a time."""
    ours = results.default_backend(entry)
    rows = []
    for contender in entry["contenders"]:
        name = contender["name"] + (" *" if contender.get("default") else "")
        name += f", {threads} thread{'s' if threads > 1 else ''}" if (threads := contender.get("threads")) else ""
        if contender["status"] != "ok":
            if contender["status"] != "skipped" or contender["kind"] == "backend":
                rows.append([name, contender["kind"], f"{contender['status']}: {contender['reason']}"[:60], *["–"] * 5])
            continue
        took = contender["seconds"]
        graph = contender.get("graph_seconds")
        ratio = results.seconds(contender) / results.seconds(ours) if ours else None
        rows.append(
            [
                name,
                contender["kind"],
                milliseconds(took["median"]),
                milliseconds(took["min"]),
                milliseconds(graph["median"]) if graph else "–",
                f"{contender['gflops']:.1f}" if entry["work"]["flops"] else "–",
                f"{contender['gbs']:.1f}",
                percent(contender["roofline"]) + ("" if ratio is None else f"  {ratio:.2f}×"),
            ]
        )
    if entry["disturbance"]:
        print(
            f"others had {percent(results.disturbed(entry))} of the processors; torch.mm "
            f"{entry['marks']['mm_gflops']['float32']:,.0f} GFLOP/s, copy {entry['marks']['copy_gbs']:,.1f} GB/s"
        )
    headers = ["contender", "", "median, ms", "min, ms", "graph, ms", "GFLOP/s", "GB/s", "roofline, time / ours"]
    return table(headers, rows)


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 1e-3 else f"{value:.2e}"
