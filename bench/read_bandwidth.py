"""How much of the machine's read bandwidth the engine uses at one row of SmolLM2, where a step reads every weight once.

`python -m bench.read_bandwidth [--threads 1 2] [--seconds 5]`: a random model of its sizes (`bench.engine`), int8, a
step with its arg-max after 64 rows. The bandwidth is that of a sum over as many bytes (`torch.sum`), in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bench.engine import packed, read_rows
from ztok_fast.engine import Engine

CONTEXT = 64


def measure(seconds: float, model: str = "smollm2") -> dict[str, list[float]]:
    """Seconds of every round of each: a step, its layers alone, the sums of as many bytes; and the bytes."""
    weights, settings = packed(model)
    engine = Engine(weights, settings, 1, CONTEXT + 1)
    token = torch.zeros(1, 1, dtype=torch.int64)
    read_rows(engine, torch.zeros(1, CONTEXT, dtype=torch.int64), 0, slice(0, 1))
    head = settings.vocabulary * settings.hidden
    everything = torch.ones(len(weights.blob) // 4, dtype=torch.float32)
    layers = torch.ones((len(weights.blob) - head) // 4, dtype=torch.float32)
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: engine.argmax(read_rows(engine, token, CONTEXT, slice(0, 1))),
        "layers": lambda: read_rows(engine, token, CONTEXT, slice(0, 1)),
        "read of a step": everything.sum,
        "read of layers": layers.sum,
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    while not found["step"] or time.perf_counter() < stop:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    found["bytes"] = [float(len(weights.blob)), float(len(weights.blob) - head)]
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each number of threads")
    options = parser.parse_args()
    for threads in options.threads:
        torch.set_num_threads(threads)
        found = measure(options.seconds)
        for name, read, size in zip(("step", "layers"), ("read of a step", "read of layers"), found["bytes"]):
            line = [f"{threads} threads, {name}, {size / 1e6:.1f} MB, {len(found[name])} rounds:"]
            for kind, of in (("median", statistics.median), ("fastest", min)):
                own, bare = of(found[name]), of(found[read])
                rate, possible = size / own / 1e9, size / bare / 1e9
                line.append(f"{kind} {own * 1e3:.2f} ms, {rate:.1f} of {possible:.1f} GB/s: {bare / own:.0%}")
            print("  ".join(line))


if __name__ == "__main__":
    main()
