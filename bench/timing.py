"""Times of calls that take turns: a sample of each in every round, so that drift of the machine hits all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch

Call = Callable[[], object]

SAMPLE_SECONDS = 2e-4
"""A sample repeats a short call until it takes this long: far above the resolution of the clock."""
GRAPH_SECONDS = 1e-3
WARM_UP_SECONDS = 0.05


@dataclass
class Timed:
    """Something to be timed: one call per input set, made inside `context` (the forced backend)."""

    name: str
    calls: Sequence[Call]
    context: Callable[[], AbstractContextManager]
    samples: list[float] = field(default_factory=list)
    repeats: int = 1
    position: int = 0
    kept: object = None  # what must live as long as the calls (the tensors that a captured graph writes)

    def next_calls(self) -> list[Call]:
        """The calls of one sample, going on where the last sample stopped, so that all input sets are used in turn."""
        n = len(self.calls)
        chosen = [self.calls[(self.position + i) % n] for i in range(self.repeats)]
        self.position = (self.position + self.repeats) % n
        return chosen

    def sample(self, cuda: bool) -> float:
        """Seconds per call: by CUDA events or by the wall clock."""
        calls = self.next_calls()
        if cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with self.context():
            begin = start.record() if cuda else time.perf_counter_ns()
            for call in calls:
                call()
            end = stop.record() if cuda else time.perf_counter_ns()
        if cuda:
            stop.synchronize()
            return start.elapsed_time(stop) / (1e3 * len(calls))
        return (end - begin) / (1e9 * len(calls))

    def warm_up(self, cuda: bool, seconds: float) -> None:
        """Run for a while; the fastest sample seen decides the number of calls per sample."""
        stop = time.perf_counter() + seconds
        fastest = self.sample(cuda)
        while time.perf_counter() < stop:
            fastest = min(fastest, self.sample(cuda))
        self.repeats = max(1, round((GRAPH_SECONDS if cuda else SAMPLE_SECONDS) / max(fastest, 1e-9)))
        self.samples.clear()


@contextmanager
def no_garbage_collection():
    """Collect once, then not until the end."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def take_turns(
    entries: Sequence[Timed], seconds: float, cuda: bool = False, min_rounds: int = 5, max_rounds: int = 400
) -> dict[str, dict]:
    """Time all within about `seconds`, each once per round, every other round in reverse order.

    Args:
        seconds: for all together; `min_rounds` may take longer.
        cuda: time with CUDA events and not with the wall clock.

    Returns:
        by name `min` and `median`, seconds per call, and `rounds` and `calls_per_sample`.
    """
    with no_garbage_collection():
        for entry in entries:
            entry.warm_up(cuda, min(WARM_UP_SECONDS, seconds / (4 * len(entries))))
        start = time.perf_counter()
        for number in range(max_rounds):
            if number >= min_rounds and time.perf_counter() - start > seconds:
                break
            for entry in entries if number % 2 == 0 else reversed(entries):
                entry.samples.append(entry.sample(cuda))
    return {
        own.name: {
            "min": min(own.samples),
            "median": median(own.samples),
            "rounds": len(own.samples),
            "calls_per_sample": own.repeats,
        }
        for own in entries
    }


def graph_of(entry: Timed) -> Timed:
    """The calls, one per input set, captured in one CUDA graph; a call of the result replays it.

    Raises:
        RuntimeError: something in them cannot be captured (it synchronises, say).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with entry.context():
        with torch.cuda.stream(stream):  # allocations and lazy initialisation happen before the capture
            for call in entry.calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in entry.calls]
    return Timed(entry.name, [graph.replay], entry.context, kept=(graph, kept))
