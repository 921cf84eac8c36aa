"""Triton backend of the LoRA linear layer, forward and backward: the host side. The kernels are in `triton_kernels.py`.

Extra memory: M r floats for the low-rank factor (twice in the backward pass), 4 M bytes where adapters are given per
sequence, and in the backward pass partial sums of dA and dB, together at most half the size of the weight.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ztok_fast.ops.backends import triton_is_interpreted
from ztok_fast.ops.lora import triton_configs as configs
from ztok_fast.ops.lora import triton_kernels as kernels
from ztok_fast.ops.triton_tables import capability_of, look_up


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _ranks(rank: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(rank)))


def row_adapters(x: Tensor, num_adapters: int, adapters: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """int32 [M], or None where every row uses adapter 0."""
    if adapters is None or cu_seqlens is None:
        return None if adapters is None else adapters.contiguous()
    rows, block = x.shape[0], configs.ADAPTER_ROWS
    out = torch.empty(rows, dtype=torch.int32, device=x.device)
    kernels.row_adapters_kernel[(triton.cdiv(rows, block),)](
        adapters.contiguous(), cu_seqlens.contiguous(), out, rows, adapters.shape[0], num_adapters, block
    )
    return out


def _shrink(x: Tensor, factor: Tensor, scaling: Tensor, adapters: Tensor | None) -> Tensor:
    """s x[m] factor[a]ᵀ for the adapter of each row; `factor` [n, r, K], any strides. float32 [M, r]."""
    rows, width = x.shape
    num_adapters, rank, _ = factor.shape
    exact = torch.float32 in (x.dtype, factor.dtype)
    tile = look_up(configs.SHRINK, capability_of(x), rows, exact)
    ranks = _ranks(rank, tile.ranks)
    low_rank = torch.empty((rows, rank), dtype=torch.float32, device=x.device)
    kernels.shrink_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(rank, ranks))](
        x, factor, scaling, adapters, low_rank, rows, width, rank, num_adapters, x.stride(0), *factor.stride(),
        SINGLE=adapters is None, EXACT=exact, UPCAST=triton_is_interpreted(),
        BM=tile.rows, BR=ranks, BK=tile.inner, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return low_rank


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: Tensor, expand: Tensor, adapters: Tensor | None):
    """x weight + bias + low_rank expand[a]; `weight` [K, N] and `expand` [n, r, N] with any strides."""
    rows, inner = x.shape
    columns, rank = weight.shape[1], low_rank.shape[1]
    float32 = x.dtype == torch.float32
    tile = look_up(configs.LINEAR, capability_of(x), rows, float32, adapters is not None)
    y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    kernels.lora_linear_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        x, weight, bias, low_rank, expand, adapters, y, rows, columns, inner, rank, expand.shape[0],
        x.stride(0), *weight.stride(), *expand.stride(),
        SINGLE=adapters is None, EVEN_K=inner % tile.inner == 0, EXACT=float32,
        UPCAST=triton_is_interpreted(), BM=tile.rows, BN=tile.columns, BK=tile.inner,
        BR=_ranks(rank, configs.low_rank_step(tile, expand.dtype != torch.bfloat16)), GROUP=configs.GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def _outer(low_rank: Tensor, right: Tensor, adapters: Tensor | None, out: Tensor, most_floats: int) -> None:
    """out[a] = sum over the rows of adapter a of low_rank[m] right[m]ᵀ; `out` [n, r, N] with any strides.

    The rows are divided into parts whose sums are added in a fixed order: the result is the same from run to run.
    """
    rows, rank = low_rank.shape
    num_adapters, _, columns = out.shape
    exact = right.dtype == torch.float32
    tile = look_up(configs.OUTER, capability_of(right), columns, exact)
    ranks = _ranks(rank, tile.ranks)
    grid = triton.cdiv(columns, tile.columns), triton.cdiv(rank, ranks)
    chunks = triton.cdiv(rows, tile.chunk)
    parts = configs.outer_parts(
        grid[0] * grid[1] * num_adapters, chunks, _multiprocessors(right), most_floats // out.numel()
    )
    sums = out[None] if parts == 1 else torch.empty((parts, *out.shape), dtype=torch.float32, device=right.device)
    kernels.outer_kernel[(*grid, num_adapters * parts)](
        low_rank, right, adapters, sums, rows, columns, rank, num_adapters, triton.cdiv(chunks, parts),
        right.stride(0), *sums.stride(),
        SINGLE=adapters is None, EXACT=exact, UPCAST=triton_is_interpreted(),
        CHUNK=tile.chunk, BM=tile.rows, BN=tile.columns, BR=ranks, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        out.copy_(sums.sum(0))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: Tensor,
    adapters: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """As `ztok_fast.ops.lora_linear`: two launches (three with `cu_seqlens`), y written once."""
    if x.shape[0] == 0 or weight.shape[0] == 0:
        return x.new_empty(x.shape[0], weight.shape[0])
    with torch.cuda.device_of(x):
        x = _dense_rows(x)
        chosen = row_adapters(x, A.shape[0], adapters, cu_seqlens)
        low_rank = _shrink(x, A, scaling, chosen)
        return _linear(x, weight.T, None if bias is None else bias.contiguous(), low_rank, B.mT, chosen)


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: Tensor,
    adapters: Tensor | None,
    cu_seqlens: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, A and B; one that `needs` does not ask for is an empty tensor.

    dx = g W + s (g B) A has the form of the forward pass and its kernels. Nothing of the size of the weight is made
    unless its gradient is asked for, which is the library's matrix product.
    """
    need_x, need_weight, need_bias, need_A, need_B = needs
    d_x, d_weight, d_bias, d_A, d_B = (grad.new_empty(0) for _ in needs)
    if need_weight:
        d_weight = grad.T @ x
    if need_bias:
        d_bias = grad.sum(0, dtype=torch.float32).to(grad.dtype)
    if x.shape[0] == 0 or weight.shape[0] == 0:
        d_x = torch.zeros_like(x) if need_x else d_x
        d_A = torch.zeros_like(A) if need_A else d_A
        d_B = torch.zeros_like(B) if need_B else d_B
        return d_x, d_weight, d_bias, d_A, d_B
    with torch.cuda.device_of(x):
        grad, x = _dense_rows(grad), _dense_rows(x)
        chosen = row_adapters(x, A.shape[0], adapters, cu_seqlens)
        room = weight.numel() // 4  # floats of partial sums, for dA and for dB
        if need_x or need_A:
            d_low_rank = _shrink(grad, B.mT, scaling, chosen)
            if need_x:
                d_x = _linear(grad, weight, None, d_low_rank, A, chosen)
            if need_A:
                d_A = torch.empty(A.shape, dtype=A.dtype, device=A.device)
                _outer(d_low_rank, x, chosen, d_A, room)
        if need_B:
            d_B = torch.empty(B.shape, dtype=B.dtype, device=B.device)
            _outer(_shrink(x, A, scaling, chosen), grad, chosen, d_B.mT, room)
    return d_x, d_weight, d_bias, d_A, d_B
