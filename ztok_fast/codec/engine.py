"""Step-by-step decoding in lock-step batches over a preallocated key-value cache."""

from __future__ import annotations

import itertools

import torch

from ztok_fast.codec.adapters import AdaptedBase


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
    """A batch of sequences under one adapter: a packed prefix first, then one row at a time.

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
        adapter: str,
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
        hidden = adapted(padded, positions, mask=mask[:, None], cache=self.cache, adapter=adapter, layers=layers)
        self.cache.advance(longest)
        self.last = hidden[:, -1]
        """Hidden state ``[B, D]`` of every sequence's last row."""

    def step(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Append one row ``[b, D]`` at ``position_ids [b]``; returns its hidden states ``[b, D]``.

        The first b sequences go on, b at most that of the step before; the others have ended.
        """
        mask = self.valid[: len(embeds), None, None, : self.cache.filled + 1]
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


@torch.inference_mode()
def decode_text(
    adapted: AdaptedBase,
    embeds,
    position_ids,
    cu_seqlens,
    lengths: torch.Tensor,
    first_position: int,
    forced: torch.Tensor | None = None,
    conditioning: torch.Tensor | None = None,
    logit_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write ``lengths[b]`` text tokens for every sequence, greedily.

    Args:
        embeds, position_ids, cu_seqlens: packed decompressor prefixes, the start row last.
        lengths: int64 ``[B]`` tokens to write, in falling order; first_position: position id of the start row.
        forced: int64 ``[B, max(lengths)]``, tokens to write instead of the model's own; -1 where there is none.
        conditioning: ``[B, max(lengths), D]``, added to the input row that writes each column (the start rows
            in ``embeds`` have theirs already).
        logit_bias: ``[B, max(lengths), D]``, added to the hidden state that predicts each column.

    Returns:
        int64 ``[B, max(lengths)]``; columns past a sequence's length are meaningless.
    """
    counts = lengths.tolist()
    if any(a < b for a, b in itertools.pairwise(counts)):
        raise ValueError("decode_text: lengths must be in falling order, got one above the one before it")
    longest, going = counts[0], len(counts)
    session = DecodeSession(adapted, "decompressor", embeds, position_ids, cu_seqlens, longest - 1)
    written = torch.zeros(len(lengths), longest, dtype=torch.int64, device=embeds.device)
    hidden = session.last
    for column in range(longest):
        token = adapted.logits(hidden if logit_bias is None else hidden + logit_bias[:going, column]).argmax(-1)
        if forced is not None:
            token = torch.where(forced[:going, column] >= 0, forced[:going, column], token)
        written[:going, column] = token
        if column + 1 < longest:
            # Sequences that are written to their end leave the batch.
            while counts[going - 1] == column + 1:
                going -= 1
            token = token[:going]
            position = torch.full_like(token, first_position + column + 1)
            row = adapted.embedding(token)
            if conditioning is not None:
                row = row + conditioning[:going, column + 1]
            hidden = session.step(row, position)
    return written


@torch.inference_mode()
def write_answer(adapted: AdaptedBase, embeds, position_ids, cu_seqlens, max_new_tokens: int, end_tokens: set[int]):
    """Greedy continuation under the inferencer: a list of token lists, without their end token.

    Args:
        embeds, position_ids, cu_seqlens: packed prefixes, at running positions.
        end_tokens: any of them ends a sequence; ``max_new_tokens`` does at the latest.
    """
    session = DecodeSession(adapted, "inferencer", embeds, position_ids, cu_seqlens, max_new_tokens)
    batch = len(cu_seqlens) - 1
    answers: list[list[int]] = [[] for _ in range(batch)]
    open_rows = set(range(batch))
    position = cu_seqlens.diff().long()
    hidden = session.last
    for count in range(1, max_new_tokens + 1):
        token = adapted.logits(hidden).argmax(-1)
        for row, value in enumerate(token.tolist()):
            if row in open_rows:
                if value in end_tokens:
                    open_rows.discard(row)
                else:
                    answers[row].append(value)
        if not open_rows or count == max_new_tokens:
            break
        hidden = session.step(adapted.embedding(token), position)
        position = position + 1
    return answers
