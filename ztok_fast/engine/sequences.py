"""The sequences that the engine holds, and which places of its key-value arenas are taken."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sequences:
    """Sequences that the engine holds: what `Engine.prefill` returns and `Engine.step` advances.

    Attributes:
        slots: int32 [B], their places in the arenas.
        adapters: int32 [B], indices of the variants of the weights.
        lengths: int32 [B], rows that each slot holds.
        positions: int64 [B], the position of the next row.
        hidden: float32 [B, D], the hidden state of the last row of each.
    """

    slots: Tensor
    adapters: Tensor
    lengths: Tensor
    positions: Tensor
    hidden: Tensor

    def __len__(self) -> int:
        return len(self.slots)


class Slots:
    """Numbers from 0 on that are handed out, the lowest free ones first, and given back."""

    def __init__(self, count: int) -> None:
        self.count = 0
        self._free: list[int] = []
        self._taken: set[int] = set()
        self.grow(count)

    @property
    def free(self) -> int:
        """How many can be acquired."""
        return len(self._free)

    def grow(self, count: int) -> None:
        """Let there be `count` slots, at least as many as before."""
        for slot in range(self.count, count):
            heapq.heappush(self._free, slot)
        self.count = max(count, self.count)

    def acquire(self, count: int) -> Tensor:
        """Take free slots; int32 [count].

        Raises:
            ValueError: fewer are free.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"engine: slots: expected a number of at least 0, got {count!r}")
        if count > len(self._free):
            raise ValueError(
                f"engine: slots: expected at most {len(self._free)} sequences, the free ones of {self.count} slots, "
                f"got {count}; release some, or call reserve(slots=...)"
            )
        slots = [heapq.heappop(self._free) for _ in range(count)]
        self._taken.update(slots)
        return torch.tensor(slots, dtype=torch.int32)

    def release(self, slots: Tensor) -> None:
        """Give slots back.

        Raises:
            ValueError: one of them is not taken, or is named twice; none is given back then.
        """
        values = slots.tolist()
        strange = set(values) - self._taken
        if strange or len(set(values)) < len(values):
            got = f"{sorted(strange)}, not taken" if strange else f"{values}, one of them twice"
            raise ValueError(f"engine: release: expected slots that are taken, got {got}")
        self._taken.difference_update(values)
        for slot in values:
            heapq.heappush(self._free, slot)
