"""Triton backend of the LoRA linear layer, forward and backward: the host side. The kernels are in `triton_kernels.py`.

Extra memory: M r floats for the low-rank factor (twice in the backward pass), 4 M bytes where adapters are given per
sequence, and in the backward pass partial sums of dA and dB, together at most half the size of the weight.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from ztok_fast.ops.backends import triton_is_interpreted
from ztok_fast.ops.lora import triton_kernels as kernels
from ztok_fast.ops.triton_launch import Tiles

# every step through the inner dimension divides this
EVEN = 64
# GROUP: row blocks that share the columns of the weight in L2
_linear_tiles = functools.partial(Tiles, kernels.lora_linear_kernel, "BM BN BK BR GROUP", key=("N", "K", "R"))
LINEAR = _linear_tiles(
    (128, 128, 32, 32, 8, 8, 4), (64, 128, 64, 32, 8, 4, 4), (128, 256, 64, 32, 8, 8, 3), (64, 64, 64, 32, 8, 4, 4)
)  # fmt: skip
# several adapters need room for a second accumulator
LINEAR_SEVERAL = _linear_tiles((128, 64, 32, 32, 8, 8, 4), (64, 128, 64, 32, 8, 8, 4), (128, 128, 64, 32, 8, 8, 3))
# float32 is multiplied without tensor cores, in registers
LINEAR_FLOAT32 = _linear_tiles((64, 64, 32, 16, 8, 8, 3))
# the inner dimension is long and the ranks are few: many row blocks are needed to occupy the device
_SHRINKS = (16, 64, 64, 4, 4), (64, 64, 64, 4, 3), (32, 64, 64, 4, 4)
SHRINK = Tiles(kernels.shrink_kernel, "BM BR BK", *_SHRINKS, key=("K", "R"))
OUTER = Tiles(kernels.outer_kernel, "BM BN BR CHUNK", (32, 64, 64, 512, 4, 3), maxnreg=255)
ROW_ADAPTERS = Tiles(kernels.row_adapters_kernel, "BM", (256, 4))


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _ranks(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def row_adapters(x: Tensor, num_adapters: int, adapters: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """int32 [M], or None where every row uses adapter 0."""
    if adapters is None or cu_seqlens is None:
        return None if adapters is None else adapters.contiguous()
    rows = x.shape[0]
    out = torch.empty(rows, dtype=torch.int32, device=x.device)
    ROW_ADAPTERS[(triton.cdiv(rows, ROW_ADAPTERS.BM),)](
        adapters.contiguous(), cu_seqlens.contiguous(), out, rows, adapters.shape[0], num_adapters
    )
    return out


def _shrink(x: Tensor, factor: Tensor, scaling: Tensor, adapters: Tensor | None) -> Tensor:
    """s x[m] factor[a]ᵀ for the adapter of each row; `factor` [n, r, K], any strides. float32 [M, r]."""
    rows, width = x.shape
    num_adapters, rank, _ = factor.shape
    exact = torch.float32 in (x.dtype, factor.dtype)
    # float32 is multiplied without tensor cores, in registers
    tiles = SHRINK.at_most(BR=_ranks(rank), BK=32 if exact else 64)
    low_rank = torch.empty((rows, rank), dtype=torch.float32, device=x.device)
    tiles[lambda size: (triton.cdiv(rows, size["BM"]), triton.cdiv(rank, size["BR"]))](
        x, factor, scaling, adapters, low_rank, rows, width, rank, num_adapters, x.stride(0), *factor.stride(),
        SINGLE=adapters is None, EXACT=exact, UPCAST=triton_is_interpreted(),
    )  # fmt: skip
    return low_rank


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: Tensor, expand: Tensor, adapters: Tensor | None):
    """x weight + bias + low_rank expand[a]; `weight` [K, N] and `expand` [n, r, N] with any strides."""
    rows, inner = x.shape
    columns, rank = weight.shape[1], low_rank.shape[1]
    float32 = x.dtype == torch.float32
    tiles = LINEAR_FLOAT32 if float32 else LINEAR if adapters is None else LINEAR_SEVERAL
    # factors that are no bfloat16 numbers are split into two terms
    tiles = tiles.at_most(BR=min(_ranks(rank), 32 if expand.dtype == torch.bfloat16 else 16))
    if inner % EVEN:  # masks of the loads take registers
        tiles = tiles.at_most(BN=64)
    y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    tiles[lambda size: (triton.cdiv(rows, size["BM"]) * triton.cdiv(columns, size["BN"]),)](
        x, weight, bias, low_rank, expand, adapters, y, rows, columns, inner, rank, expand.shape[0],
        x.stride(0), *weight.stride(), *expand.stride(),
        SINGLE=adapters is None, EVEN_K=inner % EVEN == 0, EXACT=float32, UPCAST=triton_is_interpreted(),
    )  # fmt: skip
    return y


def _outer(low_rank: Tensor, right: Tensor, adapters: Tensor | None, out: Tensor, most_floats: int) -> None:
    """out[a] = sum over the rows of adapter a of low_rank[m] right[m]ᵀ; `out` [n, r, N] with any strides.

    The rows are divided into parts whose sums are added in a fixed order: the result is the same from run to run.
    """
    rows, rank = low_rank.shape
    num_adapters, _, columns = out.shape
    exact = right.dtype == torch.float32
    tiles = OUTER.at_most(BR=_ranks(rank))
    grid = triton.cdiv(columns, tiles.BN), triton.cdiv(rank, tiles.BR)
    chunks = triton.cdiv(rows, tiles.CHUNK)
    # enough programs for the device, in as few parts as that takes
    wanted = triton.cdiv(2 * _multiprocessors(right), grid[0] * grid[1] * num_adapters)
    parts = max(1, min(wanted, chunks, most_floats // out.numel()))
    sums = out[None] if parts == 1 else torch.empty((parts, *out.shape), dtype=torch.float32, device=right.device)
    tiles[(*grid, num_adapters * parts)](
        low_rank, right, adapters, sums, rows, columns, rank, num_adapters, triton.cdiv(chunks, parts),
        right.stride(0), *sums.stride(), SINGLE=adapters is None, EXACT=exact, UPCAST=triton_is_interpreted(),
    )  # fmt: skip
    if parts > 1:
        out.copy_(sums.sum(0))


def lora_linear(x, weight, bias, A, B, scaling, adapters, cu_seqlens) -> Tensor:
    """As `ztok_fast.ops.lora_linear`: two launches (three with `cu_seqlens`), y written once."""
    if x.shape[0] == 0 or weight.shape[0] == 0:
        return x.new_empty(x.shape[0], weight.shape[0])
    x = _dense_rows(x)
    chosen = row_adapters(x, A.shape[0], adapters, cu_seqlens)
    low_rank = _shrink(x, A, scaling, chosen)
    return _linear(x, weight.T, None if bias is None else bias.contiguous(), low_rank, B.mT, chosen)


def lora_linear_backward(grad, x, weight, A, B, scaling, adapters, cu_seqlens, needs) -> tuple[Tensor, ...]:
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
