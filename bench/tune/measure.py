"""Times of candidates on the CUDA device, until a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from bench.tune.entry import Entry, line


def measure(
    entries: Iterable[Entry],
    arch: str,
    deadline: float,
    timer: Callable[[Callable[[], object]], float],
    too_large: tuple[type[Exception], ...] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[str]:
    """Time the candidates, the checked-in one first, and yield what to print.

    Per entry: the times, the line for the table if every candidate that fits was timed, and otherwise which were not. A
    candidate is begun only if as long as the longest one so far (compilation included) is left before the deadline.

    Args:
        entries: what to time.
        arch: the device's name in the tables.
        deadline: in the time of `clock`.
        timer: milliseconds of a call.
        too_large: raised for a candidate that the device has no room for.
    """
    longest = 0.0
    for entry in entries:
        table = entry.of(arch)
        checked_in = table.get(entry.key)
        if checked_in is None:
            yield f"# {entry.name}: not timed: {arch} has no such entry"
            continue
        candidates = sorted(entry.candidates, key=lambda candidate: candidate != checked_in)
        timed, left, call = [], [], None
        try:
            for candidate in candidates:
                begin = clock()
                if begin + longest > deadline:
                    left.append(candidate)
                    continue
                call = call or entry.prepare()
                table[entry.key] = candidate
                try:
                    timed.append((timer(call), candidate))
                except too_large as reason:
                    yield f"# {entry.name} {tuple(candidate)}: {reason}"
                longest = max(longest, clock() - begin)
        finally:
            table[entry.key] = checked_in
        for milliseconds, candidate in sorted(timed):
            yield f"# {entry.name} {tuple(candidate)}: {milliseconds:.4f} ms"
        if left:
            yield f"# {entry.name}: out of time, not timed: {', '.join(str(tuple(candidate)) for candidate in left)}"
        elif timed:
            yield line(entry, arch, min(timed)[1])
