"""Plain PyTorch version of the LoRA linear layer: the definition that every other backend is tested against.

The low-rank product of an adapter is made for all rows and taken only where the row uses it. For n adapters that is n
times the low-rank work, which is small beside x Wᵀ, and needs neither a sort of the rows by adapter nor a count of them
on the host. Rows of others are set to 0 at every step, not multiplied by 0: an adapter that overflowed reaches neither
the results nor the gradients of rows that do not use it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops.checks import compute_dtype
from ztok_fast.ops.op import vjp
from ztok_fast.ops.segments import adapters_of_rows


def _rows_of_adapters(num_rows, num_adapters, adapters, cu_seqlens) -> list[Tensor | None]:
    """For each adapter the rows that use it, bool [M, 1]; None stands for all rows."""
    if adapters is None:
        return [None]
    adapters = adapters_of_rows(num_rows, adapters, cu_seqlens)
    return [(adapters == adapter)[:, None] for adapter in range(num_adapters)]


def _only(rows: Tensor | None, values: Tensor) -> Tensor:
    return values if rows is None else torch.where(rows, values, 0.0)


def lora_linear(x, weight, bias, A, B, scaling, adapters, cu_seqlens):
    """See `ztok_fast.ops.lora_linear`; all arguments are given."""
    dtype = compute_dtype(x)
    scaling = scaling.to(dtype)
    with torch.autocast(x.device.type, enabled=False):  # which has cast x, weight and bias already
        y = torch.nn.functional.linear(x, weight, bias).to(dtype)
        for i, rows in enumerate(_rows_of_adapters(x.shape[0], A.shape[0], adapters, cu_seqlens)):
            own = _only(rows, x.to(dtype))
            low_rank = _only(rows, scaling[i] * (own @ A[i].to(dtype).T))  # [M, r]
            y = y + _only(rows, low_rank @ B[i].to(dtype).T)
        return y.to(x.dtype)


def lora_linear_backward(grad, x, weight, A, B, scaling, adapters, cu_seqlens, needs):
    """Gradients of x, weight, bias, A and B; one that `needs` does not ask for is an empty tensor."""
    bias = weight.new_zeros(weight.shape[0])
    grads = vjp(
        lambda x, weight, bias, A, B: lora_linear(x, weight, bias, A, B, scaling, adapters, cu_seqlens),
        (x, weight, bias, A, B), (grad,), needs,
    )  # fmt: skip
    return tuple(grad.new_empty(0) if found is None else found.contiguous() for found in grads)
