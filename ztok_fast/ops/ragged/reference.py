"""Plain PyTorch versions of the ragged-batch ops.

Nothing here reads a value back to the host: every size comes from a shape or from the caller, so the functions can be
captured in a CUDA graph. Ragged lengths only ever become index tensors on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_of_row(cu_seqlens: Tensor, total: int) -> Tensor:
    """Return the sequence that each of `total` packed rows belongs to, int64 `[total]`."""
    rows = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    # The first sequence whose end lies beyond the row: empty sequences end where they begin and are passed over.
    return torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)


def position_in_sequence(cu_seqlens: Tensor, total: int) -> Tensor:
    """Return each packed row's distance from the start of its sequence, int64 `[total]`."""
    starts = cu_seqlens.long().index_select(0, sequence_of_row(cu_seqlens, total))
    return torch.arange(total, device=cu_seqlens.device) - starts


def ragged_pack(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    sequence = sequence_of_row(cu_seqlens, total)
    return padded[sequence, position_in_sequence(cu_seqlens, total)]


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
    merged = torch.nn.functional.pad(lengths.sum(0).cumsum(0), (1, 0))  # [B + 1]
    before = lengths.cumsum(0) - lengths  # rows of earlier sources in the same sequence
    starts = merged[:-1] + before  # [n, B]
    destination = torch.cat(
        [
            starts[i].index_select(0, sequence_of_row(cu, total)) + position_in_sequence(cu, total)
            for i, (cu, total) in enumerate(zip(cu_seqlens, totals))
        ]
    )
    position_ids = position_in_sequence(merged, sum(totals))
    return merged.to(first.dtype), position_ids, destination


def ragged_gather(
    tables: list[Tensor], indices: list[Tensor | None], cu_seqlens: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    rows = [
        table if index is None else table.index_select(0, index)
        for table, index in zip(tables, indices)
    ]
    merged, position_ids, destination = ragged_layout(cu_seqlens, [len(part) for part in rows])
    gathered = torch.cat(rows)
    values = torch.empty_like(gathered).index_copy_(0, destination, gathered)
    return values, merged, position_ids


def ragged_scatter_add(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Return `[num_rows, D]` whose row i is the sum of the `rows` with `index == i`, the same bits every time.

    The dense backward of an embedding is what PyTorch has that adds in a fixed order on the CPU and on CUDA alike
    (`index_add` uses atomics there), without asking for deterministic mode globally.
    """
    wide = rows if rows.dtype == torch.float64 else rows.float()
    summed = torch.ops.aten.embedding_dense_backward(wide, index.long(), num_rows, -1, False)
    return summed.to(rows.dtype)
