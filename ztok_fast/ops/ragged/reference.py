"""Plain PyTorch versions of the ragged-batch ops, differentiable: the definition that every backend is tested against.

Nothing here reads a value back to the host: every size comes from a shape or from the caller, so the functions can be
captured in a CUDA graph. Ragged lengths only ever become index tensors on the device. Values of offsets and indices are
checked before, so that `exact` changes nothing here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops.checks import compute_dtype
from ztok_fast.ops.op import vjp
from ztok_fast.ops.segments import exclusive_cumsum, segment_sum, sequence_of


def rows_of(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the sequence of each of `total` packed rows and its position in the sequence, both int64 `[total]`.

    Rows past the last sequence are in sequence B, at their distance from its start.
    """
    rows = torch.arange(total, device=cu_seqlens.device)
    sequence = sequence_of(cu_seqlens, rows)
    return sequence, rows - cu_seqlens.long().index_select(0, sequence)


def _fill_rows(values: Tensor, rows: Tensor, fill: float = 0.0) -> Tensor:
    """`values` with `fill` in the rows for which `rows` is true; `rows` has the leading dimensions of `values`."""
    return values.masked_fill(rows.reshape(*rows.shape, *(1 for _ in values.shape[rows.ndim :])), fill)


def _no_rows_and(empty: Tensor, count: int, fill: float = 0.0) -> Tensor:
    """`count` rows of `fill`, behind the rows of an empty tensor so that autograd knows of it."""
    return torch.cat([empty, empty.new_full((count, *empty.shape[1:]), fill)])


def ragged_pack(padded: Tensor, cu_seqlens: Tensor, total: int, exact: bool) -> Tensor:
    batch, max_length = padded.shape[:2]
    if batch * max_length == 0:
        return _no_rows_and(padded.flatten(0, 1), total)
    sequence, position = rows_of(cu_seqlens, total)
    packed = padded[sequence.clamp(max=batch - 1), position.clamp(max=max_length - 1)]
    return _fill_rows(packed, sequence == batch)


def ragged_unpack(packed: Tensor, cu_seqlens: Tensor, max_length: int, fill: float, exact: bool) -> Tensor:
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    rows = starts + torch.arange(max_length, device=cu_seqlens.device)  # [B, max_length]
    if packed.shape[0] == 0:
        return _no_rows_and(packed, rows.numel(), fill).reshape(*rows.shape, *packed.shape[1:])
    padded = packed[rows.clamp(max=packed.shape[0] - 1)]
    return _fill_rows(padded, rows >= ends, fill)


def ragged_layout(cu_seqlens: list[Tensor], totals: list[int], exact: bool) -> tuple[Tensor, Tensor, Tensor]:
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
    position_ids = _fill_rows(position_ids, sequence == merged.shape[0] - 1)
    return merged.to(first.dtype), position_ids, torch.cat(destinations)


def _pick(table: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return table
    if table.shape[0] == 0:
        return _no_rows_and(table, index.shape[0])
    # indices of rows that are in no sequence can be anything
    return take_rows(table, index.clamp(0, table.shape[0] - 1))


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]`; the gradient of a row used several times is summed in a fixed order, in float32 at least."""
    dtype = table.dtype
    if table.is_floating_point() and table.requires_grad:
        table = table.to(compute_dtype(table))
    # The backward pass of index_select uses atomics on CUDA, that of an index uses them on the CPU.
    rows = table.index_select(0, index) if table.device.type == "cpu" else table[index.long()]
    return rows.to(dtype)


def ragged_gather(tables, indices, cu_seqlens, exact) -> tuple[Tensor, Tensor, Tensor]:
    rows = [_pick(table, index) for table, index in zip(tables, indices)]
    merged, position_ids, destination = ragged_layout(cu_seqlens, [len(part) for part in rows], exact)
    gathered = torch.cat(rows)
    values = torch.empty_like(gathered).index_copy(0, destination, gathered)
    slack = torch.arange(values.shape[0], device=values.device) >= merged[-1]
    return _fill_rows(values, slack), merged, position_ids


def ragged_gather_backward(grad, indices, cu_seqlens, table_rows, needed) -> list[Tensor]:
    """Return the gradient of every table, `[0, D]` for those not `needed`."""
    if not any(needed):
        return [grad.new_empty(0, grad.shape[1]) for _ in needed]
    tables = [grad.new_zeros(rows, grad.shape[1]) for rows in table_rows]  # the gather is linear: any table will do

    def values(*tables):
        return ragged_gather(list(tables), indices, cu_seqlens, False)[0]

    found = vjp(values, tuple(tables), (grad,), needed)
    # clones: the gradients may be views of one tensor, which the results of an op must not be
    return [grad.new_empty(0, grad.shape[1]) if part is None else part.clone() for part in found]


def ragged_scatter_add(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Return `[num_rows, D]` whose row i is the sum of the `rows` with `index == i`, the same bits every time."""
    return segment_sum(rows.to(compute_dtype(rows)), index, num_rows).to(rows.dtype)
