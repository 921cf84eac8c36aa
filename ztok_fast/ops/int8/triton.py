"""Triton backends of the engine's linear layers: what to launch. Nothing waits for the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ztok_fast.ops.int8.triton_kernels import int8_linear_kernel, ordered_linear_kernel, quantize_rows_kernel
from ztok_fast.ops.segments import adapters_of_rows
from ztok_fast.ops.triton_launch import Tiles

QUANTIZE = Tiles(quantize_rows_kernel, "BK", (1024, 4), fusion=False)
# BK: inputs of an operand, a quarter of those that are loaded at once
PRODUCTS = Tiles(int8_linear_kernel, "BM BN BK", (64, 64, 32, 4, 3), fusion=False)
FEW_ROWS = Tiles(int8_linear_kernel, "BM BN BK", (16, 32, 64, 4, 3), fusion=False)
ORDERED = Tiles(ordered_linear_kernel, "BM BN", (16, 64, 4), fusion=False)


def row_blocks(
    rows: int, num_adapters: int, adapters: Tensor | None, cu_seqlens: Tensor | None, size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks of at most `size` rows of one adapter; as many as there may be, of which the last may be empty.

    Returns:
        `order` int64 [M], the rows sorted by adapter; of each block its adapter, its first row in that order, and where
        the rows of its adapter end, int64.
    """
    if adapters is None:
        first = torch.arange(0, max(rows, 1), size, device=device)
        return torch.arange(rows, device=device), torch.zeros_like(first), first, torch.full_like(first, rows)
    adapters = adapters_of_rows(rows, adapters, cu_seqlens)
    order = adapters.argsort(stable=True)
    counts = (adapters[:, None] == torch.arange(num_adapters, device=device)).sum(0)
    ends, blocks = counts.cumsum(0), (counts + size - 1) // size
    before = blocks.cumsum(0)
    block = torch.arange(triton.cdiv(rows, size) + num_adapters - 1, device=device)
    adapter = torch.searchsorted(before, block, right=True).clamp(max=num_adapters - 1)
    first = (ends - counts)[adapter] + (block - (before - blocks)[adapter]) * size
    return order, adapter, first, ends[adapter]


@dataclass(frozen=True)
class Plan:
    """How the rows of a product are cut into blocks. It holds for every layer that has as many rows and adapters."""

    tiles: Tiles
    order: Tensor
    blocks: tuple[Tensor, Tensor, Tensor]


def plan(
    rows: int, num_adapters: int, adapters: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> Plan:
    """The plan of `multiply`."""
    tiles = FEW_ROWS if rows <= 16 * num_adapters else PRODUCTS
    order, adapter, first, end = row_blocks(rows, num_adapters, adapters, cu_seqlens, tiles.BM, device)
    return Plan(tiles, order, (adapter, first, end))


def multiply(x: Tensor, panels: Tensor, scales: Tensor, out_features: int, bias: Tensor | None, plan: Plan) -> Tensor:
    """`ztok_fast.ops.int8_linear` for a plan that is made already."""
    rows, width = x.shape
    _, count, quads, _, _ = panels.shape
    y = x.new_empty(rows, out_features)
    if y.numel() == 0:
        return y
    q = torch.empty((rows, 4 * quads), dtype=torch.int8, device=x.device)
    row_scales = x.new_empty(rows)
    tiles = plan.tiles
    QUANTIZE[(rows,)](x, q, row_scales, width, 4 * quads)
    tiles[len(plan.blocks[0]), triton.cdiv(out_features, tiles.BN)](
        q.view(torch.int32), row_scales, panels.view(torch.int32), scales, bias, plan.order, *plan.blocks, y,
        out_features, quads, count,
    )  # fmt: skip
    return y


def int8_linear(x, panels, scales, out_features, bias, adapters, cu_seqlens) -> Tensor:
    """See `ztok_fast.ops.int8_linear`."""
    if x.shape[0] == 0:
        return x.new_empty(0, out_features)
    found = plan(x.shape[0], panels.shape[0], adapters, cu_seqlens, x.device)
    return multiply(x, panels, scales, out_features, bias, found)


def ordered_linear(x, panels, out_features, bias) -> Tensor:
    """See `ztok_fast.ops.ordered_linear`."""
    rows, width = x.shape
    y = x.new_empty(rows, out_features)
    if y.numel() > 0:
        grid = triton.cdiv(rows, ORDERED.BM), triton.cdiv(out_features, ORDERED.BN)
        ORDERED[grid](x, panels, bias, y, rows, out_features, width)
    return y
