"""The ragged ops of the compiled CPU library. Loading it is what the requirements table does before it chooses this."""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_pack(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    return torch.ops.ztok.ragged_pack_native(padded, cu_seqlens, total)


def ragged_unpack(packed: Tensor, cu_seqlens: Tensor, max_length: int, fill: float) -> Tensor:
    return torch.ops.ztok.ragged_unpack_native(packed, cu_seqlens, max_length, fill)


def ragged_layout(cu_seqlens: list[Tensor], totals: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.ztok.ragged_layout_native(cu_seqlens, totals)


def ragged_gather(
    tables: list[Tensor], indices: list[Tensor | None], cu_seqlens: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.ztok.ragged_gather_native(tables, indices, cu_seqlens)


def ragged_gather_backward(
    grad: Tensor,
    indices: list[Tensor | None],
    cu_seqlens: list[Tensor],
    table_rows: list[int],
    needed: list[bool],
) -> list[Tensor]:
    return torch.ops.ztok.ragged_gather_backward_native(grad, indices, cu_seqlens, table_rows, needed)


def ragged_scatter_add(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return torch.ops.ztok.ragged_scatter_add_native(rows, index, num_rows)
