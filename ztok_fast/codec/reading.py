"""A base model over segments: the intervals of tokens that are known, or tokens that are found one after another.

A segment is read from its start in *readings* of at most ``window`` tokens, as many as the model reads well. The first
one begins with the start token alone; each later one with the start token and the last quarter of a window again, so
that nothing but a document's first words is read blind. Both ways give the same counts: the engine has the same bits
for a row whatever else runs (docs/determinism.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.engine import Engine
from ztok_fast.ops import token_intervals

_LOGIT_ROWS = 1024
_PASS_ROWS = 1 << 13
"""Tokens of one pass, about: enough to fill the machine; more take memory and no less time."""

Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits of rows, their segments) -> the tokens, and whether each segment ends with its token."""


class Intervals(NamedTuple):
    """Of every token the counts before its own, its own and all: int64 [T]."""

    start: Tensor
    size: Tensor
    total: Tensor


class Reader:
    """Reads segments with an engine that has a slot for each of ``rows``.

    Args:
        start: the start token; window: tokens of one reading, its start token counted and its last token not.
    """

    def __init__(self, engine: Engine, start: int, rows: int, window: int) -> None:
        self.engine, self.start, self.rows, self.window = engine, start, rows, window
        self.kept = window // 4

    def intervals(self, segments: Sequence[Sequence[int]]) -> Intervals:
        """Of all tokens, segment after segment."""
        readings = [reading for segment in segments for reading in self._readings(segment)]
        # One tensor for all: small ones that outlive the logits before them would keep the allocator from using the
        # place of those logits again.
        found = torch.empty(3, sum(map(len, segments)), dtype=torch.int64)
        side_by_side, at = max(1, min(self.rows, _PASS_ROWS // self.window)), 0
        for first in range(0, len(readings), side_by_side):
            at = self._read(readings[first : first + side_by_side], found, at)
        return Intervals(*found)

    def _readings(self, segment: Sequence[int]) -> Iterator[tuple[Sequence[int], int]]:
        """The tokens of each reading, and how many of them are read again."""
        at = 0
        while at < len(segment):
            again = min(self.kept, at)
            end = at + self.window - again
            yield segment[at - again : end], again
            at = end

    def _read(self, readings: list[tuple[Sequence[int], int]], found: Tensor, at: int) -> int:
        """Put the intervals of readings into ``found`` from ``at`` on; where they end."""
        counts = torch.tensor([len(tokens) for tokens, _ in readings])
        inputs = torch.tensor([t for tokens, _ in readings for t in [self.start, *tokens[:-1]]])
        targets = torch.tensor([t for tokens, again in readings for t in tokens[again:]])
        positions = torch.cat([torch.arange(n) for n in counts.tolist()])
        cu = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        slots = torch.arange(len(readings), dtype=torch.int32)
        hidden = self.engine.forward(inputs, positions, cu, slots, torch.zeros_like(slots))
        if len(targets) < len(inputs):
            hidden = hidden[positions >= torch.tensor([again for _, again in readings]).repeat_interleave(counts)]
        for rows, own in zip(hidden.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS)):
            for row, values in zip(found, token_intervals(self.engine.logits(rows).cpu(), own)):
                row[at : at + len(own)] = values
            at += len(own)
        return at

    def write(
        self, limits: Tensor, choose: Choose, ended: Callable[[Tensor], None] = lambda segments: None
    ) -> tuple[Tensor, Tensor]:
        """Find the tokens of segments, many side by side; one that ends makes room for one that waits.

        Args:
            limits: int64 [S], most tokens of every segment; at least one.
            choose: finds the next token of each of some segments. ended: told which segments have just ended.

        Returns:
            Tokens int64 [S, most of limits], and how many of them each segment has.
        """
        count = len(limits)
        written = torch.zeros(count, int(limits.max()) if count else 0, dtype=torch.int64)
        sizes = torch.zeros(count, dtype=torch.int64)
        waiting = limits.argsort(descending=True, stable=True)  # those of equal length end together
        running = slots = torch.empty(0, dtype=torch.int64)
        done = place = tokens = running
        free = torch.arange(self.rows)
        while len(running) or len(waiting):
            entering = waiting[: len(free)]
            if len(entering):
                running, waiting = torch.cat([running, entering]), waiting[len(entering) :]
                slots, free = torch.cat([slots, free[: len(entering)]]), free[len(entering) :]
                done, place = (torch.cat([value, torch.zeros_like(entering)]) for value in (done, place))
                tokens = torch.cat([tokens, torch.full_like(entering, self.start)])
            full = place == self.window
            if bool(full.any()):
                place = place.masked_fill(full, self.kept)
                if self.kept:
                    self._read_again(written, running[full], done[full], slots[full])
                else:
                    tokens = tokens.masked_fill(full, self.start)
            cu = torch.arange(len(running) + 1, dtype=torch.int32)
            hidden = self.engine.forward(tokens, place, cu, slots.int(), place.int())
            tokens, last = choose(self.engine.logits(hidden).cpu(), running)
            written[running, done] = tokens
            done, place = done + 1, place + 1
            last = last | (done == limits[running])
            if bool(last.any()):
                sizes[running[last]] = done[last]
                ended(running[last])
                free = torch.cat([free, slots[last]])
                going = ~last
                running, slots, done = running[going], slots[going], done[going]
                place, tokens = place[going], tokens[going]
        return written, sizes

    def _read_again(self, written: Tensor, segments: Tensor, done: Tensor, slots: Tensor) -> None:
        """Begin a reading in each of some slots: all that it reads again but the last token, which comes next."""
        back = torch.arange(1 - self.kept, 0)
        again = written[segments[:, None], done[:, None] + back - 1]
        tokens = torch.cat([torch.full_like(segments, self.start)[:, None], again], 1).flatten()
        positions = torch.arange(self.kept).repeat(len(segments))
        cu = torch.arange(len(segments) + 1, dtype=torch.int32) * self.kept
        self.engine.forward(tokens, positions, cu, slots.int(), torch.zeros(len(segments), dtype=torch.int32))
