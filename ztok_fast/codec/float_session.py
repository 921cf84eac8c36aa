"""Step-by-step decoding by transformers' modules: lock-step batches over a preallocated key-value cache."""

from __future__ import annotations

import torch

from ztok_fast.codec.adapters import AdaptedBase
from ztok_fast.profiling import MODEL, stage


class DecodeCache:
    """Keys and values of every layer in buffers of a fixed capacity; rows share the write position.

    Stands in for transformers' caches: the attention layers call `update`.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.filled = capacity, 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        """Write ``[B, H, T, d]`` at the current position; returns views of all that is filled.

        Later writes may have fewer rows: those of the first sequences.
        """
        rows, _, count, _ = keys.shape
        if layer not in self._layers:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self._layers[layer] = (keys.new_zeros(shape), values.new_zeros(shape))
        stop = self.filled + count
        if stop > self.capacity:
            raise ValueError(f"decode cache: expected at most {self.capacity} rows, got {stop}")
        buffers = self._layers[layer]
        for buffer, new in zip(buffers, (keys, values)):
            buffer[:rows, :, self.filled : stop] = new
        return buffers[0][:rows, :, :stop], buffers[1][:rows, :, :stop]

    def advance(self, count: int) -> None:
        """Move the write position; called once every layer has been written."""
        self.filled += count

    def get_seq_length(self, layer: int = 0) -> int:
        return self.filled


class DecodeSession:
    """A batch of sequences under one adapter (``None``: the bare base): a packed prefix first, then one row at a time.

    Prefixes are aligned at their ends, so that all sequences write the same cache column.

    Args:
        embeds: packed prefix embeddings ``[R, D]``; position_ids int64 ``[R]``; cu_seqlens int32 ``[B + 1]``,
            every sequence with at least one row.
        new_rows: how many rows will follow at most.
        layers: run only the first ``layers`` of the base's stack; ``None`` for all.
    """

    def __init__(
        self,
        adapted: AdaptedBase,
        adapter: str | None,
        embeds,
        position_ids,
        cu_seqlens,
        new_rows: int,
        layers: int | None = None,
    ) -> None:
        self.adapted, self.adapter, self.layers = adapted, adapter, layers
        lengths = cu_seqlens.diff().long()
        batch, longest = len(lengths), int(lengths.max())
        device = embeds.device
        # Row j of a sequence of n rows goes to column longest - n + j.
        sequence = torch.repeat_interleave(torch.arange(batch, device=device), lengths)
        column = torch.arange(len(embeds), device=device) - cu_seqlens.long()[sequence] + (longest - lengths)[sequence]
        padded = embeds.new_zeros(batch, longest, embeds.shape[1])
        padded[sequence, column] = embeds
        positions = torch.zeros(batch, longest, dtype=torch.int64, device=device)
        positions[sequence, column] = position_ids
        valid = torch.zeros(batch, longest + new_rows, dtype=torch.bool, device=device)
        valid[sequence, column] = True
        valid[:, longest:] = True
        self.valid, self.cache = valid, DecodeCache(longest + new_rows)
        causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        # Padding rows attend to themselves: a row that attends to nothing would fill the cache with NaN.
        itself = torch.eye(longest, dtype=torch.bool, device=device)
        mask = (valid[:, None, :longest] & causal) | itself
        with stage(MODEL, len(embeds), layers):
            hidden = adapted(padded, positions, mask=mask[:, None], cache=self.cache, adapter=adapter, layers=layers)
        self.cache.advance(longest)
        self.last = hidden[:, -1]
        """Hidden state ``[B, D]`` of every sequence's last row."""

    def draft(self, *text) -> None:
        """No faster way than steps."""

    def step(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Append one row ``[b, D]`` at ``position_ids [b]``; returns its hidden states ``[b, D]``.

        The first b sequences go on, b at most that of the step before; the others have ended.
        """
        mask = self.valid[: len(embeds), None, None, : self.cache.filled + 1]
        with stage(MODEL, len(embeds), self.layers):
            hidden = self.adapted(
                embeds[:, None],
                position_ids[:, None],
                mask=mask,
                cache=self.cache,
                adapter=self.adapter,
                layers=self.layers,
            )
        self.cache.advance(1)
        self.last = hidden[:, -1]
        return self.last
