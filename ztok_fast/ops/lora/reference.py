"""Plain PyTorch version of the LoRA linear layer, forward and backward.

The low-rank product of an adapter is made for all rows and then taken only where the row uses it. For n adapters that
is n times the low-rank work, which is small beside x Wᵀ, and needs neither a sort of the rows by adapter nor a count
of them on the host. It is a choice (`where`), not a product with 0: an adapter that overflowed must not reach the rows
of another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops.checks import compute_dtype
from ztok_fast.ops.segments import sequence_of


def rows_of_adapters(
    num_rows: int, num_adapters: int, adapters: Tensor | None, cu_seqlens: Tensor | None
) -> list[Tensor | None]:
    """Return for each adapter the rows that use it, bool `[M, 1]`; None stands for all rows."""
    if adapters is None:
        return [None]
    if cu_seqlens is not None:
        rows = torch.arange(num_rows, device=adapters.device)
        adapters = adapters.index_select(0, sequence_of(cu_seqlens, rows))
    return [(adapters == adapter)[:, None] for adapter in range(num_adapters)]


def add_where(rows: Tensor | None, total: Tensor, part: Tensor) -> Tensor:
    return total + part if rows is None else torch.where(rows, total + part, total)


def keep_where(rows: Tensor | None, values: Tensor) -> Tensor:
    return values if rows is None else torch.where(rows, values, 0.0)


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
    dtype = compute_dtype(x)
    wide_x, down, up = x.to(dtype), A.to(dtype), B.to(dtype)
    scaling = scaling.to(dtype)
    y = torch.nn.functional.linear(x, weight, bias).to(dtype)
    for i, rows in enumerate(rows_of_adapters(x.shape[0], A.shape[0], adapters, cu_seqlens)):
        low_rank = scaling[i] * (wide_x @ down[i].T)  # [M, r]
        y = add_where(rows, y, low_rank @ up[i].T)
    return y.to(x.dtype)


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
    """Return the gradients of x, weight, bias, A and B; one that `needs` does not ask for is an empty tensor."""
    need_x, need_weight, need_bias, need_A, need_B = needs
    dtype = compute_dtype(x)
    wide_grad, wide_x, down, up = grad.to(dtype), x.to(dtype), A.to(dtype), B.to(dtype)
    scaling = scaling.to(dtype)
    # Five tensors, not one five times: outputs of a custom op must not alias each other.
    d_x, d_weight, d_bias, d_A, d_B = (grad.new_empty(0) for _ in needs)
    if need_x:
        d_x = (grad @ weight).to(dtype)
    if need_weight:
        d_weight = grad.T @ x
    if need_bias:
        d_bias = grad.sum(0, dtype=dtype).to(grad.dtype)
    if need_A:
        d_A = A.new_empty(A.shape)
    if need_B:
        d_B = B.new_empty(B.shape)
    for i, rows in enumerate(rows_of_adapters(x.shape[0], A.shape[0], adapters, cu_seqlens)):
        if need_x or need_A:
            d_low_rank = keep_where(rows, scaling[i] * (wide_grad @ up[i]))  # [M, r]
        if need_x:
            d_x = add_where(rows, d_x, d_low_rank @ down[i])
        if need_A:
            d_A[i] = d_low_rank.T @ wide_x
        if need_B:
            low_rank = keep_where(rows, scaling[i] * (wide_x @ down[i].T))
            d_B[i] = wide_grad.T @ low_rank
    return d_x.to(x.dtype) if need_x else d_x, d_weight, d_bias, d_A, d_B
