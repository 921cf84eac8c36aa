"""Plain PyTorch version of the LoRA linear layer, forward and backward.

The adapters are laid side by side as one `[n·r, in]` and one `[n·r, out]` matrix, and what a row would get from the
adapters that it does not use is set to zero. That costs n times the low-rank work, which is small beside x Wᵀ, and
needs neither a sort of the rows by adapter nor a count of them on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops.checks import compute_dtype
from ztok_fast.ops.ragged.reference import sequence_of_row


def adapter_coefficients(
    x: Tensor, scaling: Tensor, adapters: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Return `[M, n]`: the scaling of the adapter that a row uses, zero for all others."""
    scaling = scaling.to(compute_dtype(x))
    if adapters is None:
        return scaling.expand(x.shape[0], -1)
    if cu_seqlens is not None:
        adapters = adapters.index_select(0, sequence_of_row(cu_seqlens, x.shape[0]))
    used = adapters[:, None] == torch.arange(len(scaling), device=x.device)
    return torch.where(used, scaling, 0.0)


def select(low_rank: Tensor, coefficients: Tensor) -> Tensor:
    """Scale `low_rank [M, n·r]` by a row's coefficients; what belongs to unused adapters becomes exactly zero."""
    grouped = low_rank.unflatten(1, (coefficients.shape[1], -1))  # [M, n, r]
    # where, not a product: an adapter that overflowed must not turn rows of other adapters into NaN.
    scaled = torch.where(coefficients[:, :, None] != 0, grouped * coefficients[:, :, None], 0.0)
    return scaled.flatten(1)


def flatten_adapters(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A as `[n·r, in]` and B as `[n·r, out]`."""
    return A.to(dtype).flatten(0, 1), B.to(dtype).transpose(1, 2).flatten(0, 1)


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
    down, up = flatten_adapters(A, B, dtype)
    coefficients = adapter_coefficients(x, scaling, adapters, cu_seqlens)
    low_rank = select(x.to(dtype) @ down.T, coefficients)  # [M, n·r]
    base = torch.nn.functional.linear(x, weight, bias)
    return (base.to(dtype) + low_rank @ up).to(x.dtype)


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
    down, up = flatten_adapters(A, B, dtype)
    coefficients = adapter_coefficients(x, scaling, adapters, cu_seqlens)
    wide_grad, wide_x = grad.to(dtype), x.to(dtype)
    # Five tensors, not one five times: outputs of a custom op must not alias each other.
    d_x, d_weight, d_bias, d_A, d_B = (grad.new_empty(0) for _ in needs)
    if need_x or need_A:
        d_low_rank = select(wide_grad @ up.T, coefficients)  # [M, n·r]
    if need_x:
        d_x = ((grad @ weight).to(dtype) + d_low_rank @ down).to(x.dtype)
    if need_weight:
        d_weight = grad.T @ x
    if need_bias:
        d_bias = grad.sum(0, dtype=dtype).to(grad.dtype)
    if need_A:
        d_A = (d_low_rank.T @ wide_x).view(A.shape).to(A.dtype)
    if need_B:
        low_rank = select(wide_x @ down.T, coefficients)
        d_up = (low_rank.T @ wide_grad).unflatten(0, A.shape[:2])  # [n, r, out]
        d_B = d_up.transpose(1, 2).to(B.dtype).contiguous()
    return d_x, d_weight, d_bias, d_A, d_B
