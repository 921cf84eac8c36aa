"""Plain PyTorch versions of the ragged-batch ops.

Nothing here reads a value back to the host: every size comes from a shape or from the caller, so the functions can be
captured in a CUDA graph. Ragged lengths only ever become index tensors on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops.checks import compute_dtype
from ztok_fast.ops.segments import exclusive_cumsum, segment_sum, sequence_of


def rows_of(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the sequence of each of `total` packed rows and its position in the sequence, both int64 `[total]`."""
    rows = torch.arange(total, device=cu_seqlens.device)
    sequence = sequence_of(cu_seqlens, rows)
    return sequence, rows - cu_seqlens.long().index_select(0, sequence)


def ragged_pack(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    return padded[rows_of(cu_seqlens, total)]


def ragged_unpack(packed: Tensor, cu_seqlens: Tensor, max_length: int, fill: float) -> Tensor:
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    rows = starts + torch.arange(max_length, device=cu_seqlens.device)  # [B, max_length]
    shape = (*rows.shape, *packed.shape[1:])
    if packed.shape[0] == 0:
        return packed.new_full(shape, fill)
    padded = packed[rows.clamp(max=packed.shape[0] - 1)]
    inside = (rows < ends).reshape(*rows.shape, *(1 for _ in packed.shape[1:]))
    return padded.masked_fill_(~inside, fill)


def ragged_layout(cu_seqlens: list[Tensor], totals: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(cu_seqlens [B + 1], position_ids int64 [T], destination int64 [T])` of the interleaved sources.

    `destination` holds, for the rows of source 0, then those of source 1 and so on, the output row each goes to.
    """
    first = cu_seqlens[0]
    lengths = torch.stack([cu.long().diff() for cu in cu_seqlens])  # [n, B]
    merged = exclusive_cumsum(lengths.sum(0))  # [B + 1]
    before = lengths.cumsum(0) - lengths  # rows of earlier sources in the same sequence
    starts = merged[:-1] + before  # [n, B]
    destinations = []
    for source_starts, cu, total in zip(starts, cu_seqlens, totals):
        sequence, position = rows_of(cu, total)
        destinations.append(source_starts.index_select(0, sequence) + position)
    _, position_ids = rows_of(merged, sum(totals))
    return merged.to(first.dtype), position_ids, torch.cat(destinations)


def ragged_gather(
    tables: list[Tensor], indices: list[Tensor | None], cu_seqlens: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    rows = [table if index is None else table.index_select(0, index) for table, index in zip(tables, indices)]
    merged, position_ids, destination = ragged_layout(cu_seqlens, [len(part) for part in rows])
    gathered = torch.cat(rows)
    values = torch.empty_like(gathered).index_copy_(0, destination, gathered)
    return values, merged, position_ids


def ragged_scatter_add(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Return `[num_rows, D]` whose row i is the sum of the `rows` with `index == i`, the same bits every time."""
    return segment_sum(rows.to(compute_dtype(rows)), index, num_rows).to(rows.dtype)
