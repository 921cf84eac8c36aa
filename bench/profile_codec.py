"""Profiles compressing and decompressing the text that ships, with a shipped codec: a trace, a table, the host's share.

    python -m bench.profile_codec --device cuda --out results/

Writes trace.json.gz (chrome://tracing, Perfetto) and profile.txt to the folder.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.machine import environment, summary
from bench.tables import number, percent, table

PHASES = ("compress", "decompress")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_codec", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--codec", default="ztok-mini", help="codec, by name or folder")
    add("--device", default="cpu")
    add("--out", required=True, help="folder for the trace and the table")
    add("--text", help="file with the text (default: the one that ships)")
    add("--documents", type=int, default=16, help="so many documents, cut from the text at mixed lengths")
    add("--ratio", type=float, default=4.0)
    options = parser.parse_args(argv)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    report = run(options, out)
    (out / "profile.txt").write_text(report + "\n", encoding="utf-8")
    print(report)
    return 0


def mixed_documents(text: str, count: int) -> list[str]:
    """Prefixes of the text of 1/count, 2/count, ... of its length: every length occurs, the mean is half of it."""
    return [text[: max(1, len(text) * (i + 1) // count)] for i in range(count)]


def run(options: argparse.Namespace, out: Path) -> str:
    """Measure each phase unprofiled, then profile both; returns the report."""
    from ztok_fast.cli.evaluation import SAMPLE
    from ztok_fast.codec.codec import ZTokCodec

    cuda = torch.device(options.device).type == "cuda"
    text = Path(options.text or SAMPLE).read_text(encoding="utf-8")
    documents = mixed_documents(text, options.documents)
    codec = ZTokCodec.from_pretrained(options.codec).to(options.device)
    z = codec.compress(documents, options.ratio)  # warm-up: loads, compiles, picks algorithms
    codec.decompress(z)
    phases = {"compress": lambda: codec.compress(documents, options.ratio), "decompress": lambda: codec.decompress(z)}
    wall = {name: _seconds(phase, cuda) for name, phase in phases.items()}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=False) as profiler:
        for name, phase in phases.items():
            with record_function(name):
                phase()
                if cuda:
                    torch.cuda.synchronize()
    profiler.export_chrome_trace(str(out / "trace.json.gz"))
    facts = environment("bench.profile_codec", [])
    rows = []
    for name in PHASES:
        idle = percent(max(0.0, 1 - _device_seconds(profiler, name) / wall[name])) if cuda else "–"
        speed = f"{z.tokens / wall[name]:,.0f}"
        rows.append([name, f"{z.tokens:,}", f"{z.ztokens:,}", number(1e3 * wall[name]), speed, idle])
    headers = ["phase", "text tokens", "Z-tokens", "ms", "text tokens/s", "time with an idle GPU"]
    order = f"self_{'device' if cuda else 'cpu'}_time_total"
    top = profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
    return f"{options.codec}, {len(documents)} documents; {summary(facts)}\n\n{table(headers, rows)}\n\n{top}"


def _seconds(phase, cuda: bool, times: int = 3) -> float:
    """The fastest of a few runs."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        phase()
        if cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


def _device_seconds(profiler, phase: str) -> float:
    """Time in which a kernel or copy ran on the GPU while the phase did: the union of their intervals."""
    events = profiler.events()
    (span,) = [e.time_range for e in events if e.name == phase and e.device_type == torch.autograd.DeviceType.CPU]
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and e.name not in PHASES]
    ranges = [(e.time_range.start, e.time_range.end) for e in kernels]
    intervals = sorted(own for own in ranges if span.start <= own[0] <= span.end)
    busy, end = 0.0, float("-inf")
    for start, stop in intervals:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e6


if __name__ == "__main__":
    raise SystemExit(main())
