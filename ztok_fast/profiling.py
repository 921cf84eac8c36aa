"""Time per stage of the codec, as `ztok bench` shows it.

Code that does the work names its stages with ``with stage("model", rows=n):``. Where nobody measures that costs the
look-up of one variable; inside ``with profile() as found:`` each stage is recorded.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ztok_fast.files import replace_atomically

TOKENISE, MODEL, HALTING, QUANTISE, HEAD, REST = "tokenise", "model passes", "halting", "quantise", "head", "rest"
STAGES = (TOKENISE, MODEL, HALTING, QUANTISE, HEAD)


@dataclass
class Span:
    """One stage that was run: nanoseconds of the clock, and what it was told of its work.

    Attributes:
        own: its time without that of stages inside it.
        rows: rows that it worked on; layers: how many of the base's layers ran, None for all.
    """

    name: str
    start: int
    duration: int
    own: int
    rows: int = 0
    layers: int | None = None


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *exception) -> None: ...


_NOTHING = _Nothing()


@dataclass
class Profile:
    """What one thread did inside `profile`.

    Attributes:
        running, places: sums over the steps of batches: rows that still ran, and rows that the batch began with.
        nanoseconds: of the whole.
    """

    spans: list[Span] = field(default_factory=list)
    counters: list[tuple[int, int, int]] = field(default_factory=list)
    start: int = 0
    nanoseconds: int = 0
    thread: int = field(default_factory=threading.get_ident)
    _inside: list[int] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, rows: int, layers: int | None) -> Iterator[None]:
        self._inside.append(0)
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            duration = time.perf_counter_ns() - start
            inside = self._inside.pop()
            if self._inside:
                self._inside[-1] += duration
            self.spans.append(Span(name, start, duration, duration - inside, rows, layers))

    @property
    def occupancy(self) -> float | None:
        """Rows that ran over rows of the batch, over all steps; None where nothing was written step by step."""
        places = sum(of for _, _, of in self.counters)
        return self.passes / places if places else None

    @property
    def passes(self) -> int:
        """Passes over all sequences that were written: how many steps each ran, added up."""
        return sum(running for _, running, _ in self.counters)

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, without stages inside it, and of the rest, which is between them."""
        found = dict.fromkeys(STAGES, 0.0)
        for span in self.spans:
            found[span.name] = found.get(span.name, 0.0) + span.own / 1e9
        return {**found, REST: max(0.0, self.nanoseconds / 1e9 - sum(found.values()))}

    def write_trace(self, path: str | Path, title: str) -> None:
        """Write the stages as a Chrome trace (chrome://tracing, Perfetto): microseconds from the beginning."""
        process = os.getpid()
        common = {"pid": process, "tid": self.thread}
        events: list[dict] = [{"name": "process_name", "ph": "M", "args": {"name": title}, **common}]
        whole = {"name": title, "ph": "X", "ts": 0.0, "dur": self.nanoseconds / 1e3, **common}
        events.append(whole)
        for span in self.spans:
            at, took = (span.start - self.start) / 1e3, span.duration / 1e3
            arguments = {"rows": span.rows} if span.rows else {}
            events.append({"name": span.name, "ph": "X", "ts": at, "dur": took, "args": arguments, **common})
        for when, running, of in self.counters:
            rows = {"running": running, "ended": of - running}
            events.append({"name": "batch", "ph": "C", "ts": (when - self.start) / 1e3, "args": rows, **common})
        with replace_atomically(path) as temporary:
            temporary.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


_current: Profile | None = None


def _mine() -> Profile | None:
    return _current if _current is not None and _current.thread == threading.get_ident() else None


def stage(name: str, rows: int = 0, layers: int | None = None) -> AbstractContextManager[None]:
    """The time inside counts as that of the stage, where this thread is measured."""
    own = None if _current is None else _mine()
    return _NOTHING if own is None else own.stage(name, rows, layers)


def measuring() -> bool:
    """Whether this thread is measured: asked where a figure costs something to find."""
    return _current is not None and _mine() is not None


def count_rows(running: int, of: int) -> None:
    """Note that a step of a batch of `of` sequences works on `running` that have not ended."""
    if _current is not None and (own := _mine()) is not None:
        own.counters.append((time.perf_counter_ns(), running, of))


@contextmanager
def profile() -> Iterator[Profile]:
    """Record the stages that this thread runs inside.

    Raises:
        RuntimeError: something is measured already.
    """
    global _current
    if _current is not None:
        raise RuntimeError("profile: expected no other measurement in this process, got one that runs")
    found = Profile(start=time.perf_counter_ns())
    _current = found
    try:
        yield found
    finally:
        _current = None
        found.nanoseconds = time.perf_counter_ns() - found.start


def host_share(call: Callable[[], object]) -> float:
    """The share of a call's time in which the calling thread is in no torch op and not in the tokenizer.

    Torch's profiler records the ops, at about a microsecond each, which counts as time outside of them.
    """
    import torch

    ops = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with _quiet_stderr():
        ops.start()
    try:
        with profile() as stages, torch.profiler.record_function(_MARK):
            begin = time.perf_counter_ns()
            call()
            took = time.perf_counter_ns() - begin
    finally:
        with _quiet_stderr():
            ops.stop()
    profiler: Any = ops.profiler
    recorded = profiler.kineto_results.events()
    marks = [event for event in recorded if event.name() == _MARK]
    own = [e for e in recorded if e.start_thread_id() == marks[0].start_thread_id() and e.name() != _MARK]
    covered, end = 0, 0
    for event in sorted(own, key=lambda e: e.start_ns()):  # ops lie inside one another
        start, stop = max(end, event.start_ns()), event.start_ns() + event.duration_ns()
        covered, end = covered + max(0, stop - start), max(end, stop)
    covered += sum(span.own for span in stages.spans if span.name == TOKENISE)
    return max(0.0, 1 - covered / took)


_MARK = "ztok_fast.profiling"


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Torch's profiler, where it is built with probes, writes a line on starting and on stopping."""
    try:
        kept = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
