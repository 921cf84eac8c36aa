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
    """Return the sequence of each of `total` packed rows and its position in the sequence, both int64 `[total]`.

    Rows past the last sequence are in sequence B, at their distance from its start.
    """
    rows = torch.arange(total, device=cu_seqlens.device)
    sequence = sequence_of(cu_seqlens, rows)
    return sequence, rows - cu_seqlens.long().index_select(0, sequence)


def _zero_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Zero the rows for which `rows` [T] is true, in place."""
    return values.masked_fill_(rows.reshape(-1, *(1 for _ in values.shape[1:])), 0)


def ragged_pack(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    batch, max_length = padded.shape[:2]
    if batch * max_length == 0:
        return padded.new_zeros(total, *padded.shape[2:])
    sequence, position = rows_of(cu_seqlens, total)
    packed = padded[sequence.clamp(max=batch - 1), position.clamp(max=max_length - 1)]
    return _zero_rows(packed, sequence == batch)


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
    slack = merged[-1:]  # where the rows of the next source that are in no sequence go
    destinations = []
    for source_starts, cu, total in zip(starts, cu_seqlens, totals):
        sequence, position = rows_of(cu, total)
        destinations.append(torch.cat([source_starts, slack]).index_select(0, sequence) + position)
        slack = slack + total - cu[-1:].long()
    sequence, position_ids = rows_of(merged, sum(totals))
    position_ids = _zero_rows(position_ids, sequence == merged.shape[0] - 1)
    return merged.to(first.dtype), position_ids, torch.cat(destinations)


def _pick(table: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return table
    if table.shape[0] == 0:
        return table.new_zeros(index.shape[0], *table.shape[1:])
    # indices of rows that are in no sequence can be anything
    return table.index_select(0, index.clamp(0, table.shape[0] - 1))


def ragged_gather(
    tables: list[Tensor], indices: list[Tensor | None], cu_seqlens: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    rows = [_pick(table, index) for table, index in zip(tables, indices)]
    merged, position_ids, destination = ragged_layout(cu_seqlens, [len(part) for part in rows])
    gathered = torch.cat(rows)
    values = torch.empty_like(gathered).index_copy_(0, destination, gathered)
    slack = torch.arange(len(values), device=values.device) >= merged[-1]
    return _zero_rows(values, slack), merged, position_ids


def ragged_gather_backward(
    grad: Tensor,
    indices: list[Tensor | None],
    cu_seqlens: list[Tensor],
    table_rows: list[int],
    needed: list[bool],
) -> list[Tensor]:
    """Return the gradient of every table, `[0, D]` for those not `needed`."""
    totals = [rows if index is None else index.shape[0] for rows, index in zip(table_rows, indices)]
    _, _, destination = ragged_layout(cu_seqlens, totals)
    grads = []
    for i, rows in enumerate(destination.split(totals)):
        if not needed[i]:
            grads.append(grad.new_empty(0, grad.shape[1]))
            continue
        slack = torch.arange(totals[i], device=grad.device) >= cu_seqlens[i][-1]
        source_grad = _zero_rows(grad.index_select(0, rows), slack)
        if indices[i] is not None:
            index = indices[i].long().masked_fill(slack, table_rows[i])
            source_grad = ragged_scatter_add(source_grad, index, table_rows[i])
        grads.append(source_grad)
    return grads


def ragged_scatter_add(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Return `[num_rows, D]` whose row i is the sum of the `rows` with `index == i`, the same bits every time."""
    return segment_sum(rows.to(compute_dtype(rows)), index, num_rows).to(rows.dtype)
