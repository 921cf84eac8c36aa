"""Plain PyTorch version of the engine's linear layers: the definition that every other backend is tested against.

Nothing here rounds otherwise on another machine: quantisation takes elementwise IEEE operations alone, integer sums are
exact in float64, and the fused multiply-add of float32 is made of float64 operations. Two traps are avoided: a division
by, or of, a Python number may become a multiplication by the reciprocal, and `torch.add(..., alpha)` may be fused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops.arithmetic import fma
from ztok_fast.ops.segments import adapters_of_rows

COLUMNS, DEPTH = 16, 64
"""Output channels of a panel, and what the depth of int8 panels is a multiple of."""
_LARGEST, _LEAST = 127.0, 2.0**-100


def round_up(size: int, step: int) -> int:
    """The least multiple of `step` that is at least `size`."""
    return (size + step - 1) // step * step


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [..., M, in] and scales float32 [..., M] of float32 rows."""
    largest = x.abs().amax(-1)
    finite, small = largest.isfinite(), largest < _LEAST
    usable = finite & ~small
    top = torch.full_like(largest, _LARGEST)
    factor = top / torch.where(usable, largest, 1.0)
    q = torch.where(usable[..., None], (x * factor[..., None]).round(), 0.0).to(torch.int8)
    scales = torch.where(finite, torch.where(small, 0.0, largest / top), torch.nan)
    return q, scales


def int8_pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `ztok_fast.ops.int8_pack`."""
    q, scales = quantize_rows(weight.float())
    *lead, out, width = weight.shape
    columns, depth = round_up(out, COLUMNS), round_up(width, DEPTH)
    padded = torch.nn.functional.pad(q.short(), (0, depth - width, 0, columns - out)) + 128
    panels = padded.to(torch.uint8).view(*lead, columns // COLUMNS, COLUMNS, depth // 4, 4)
    return panels.transpose(-3, -2).contiguous(), torch.nn.functional.pad(scales, (0, columns - out))


def int8_unpack(panels: Tensor) -> Tensor:
    """int16 [..., 16 P, K64] from panels: the weights as integers, padding included."""
    *lead, count, quads, columns, four = panels.shape
    return panels.transpose(-3, -2).reshape(*lead, count * columns, quads * four).short() - 128


def rows_of_adapters(num_rows: int, num_adapters: int, adapters, cu_seqlens) -> list[Tensor | slice]:
    """For each adapter an index of the rows that use it."""
    if adapters is None:
        return [slice(None)]
    adapters = adapters_of_rows(num_rows, adapters, cu_seqlens)
    return [(adapters == adapter).nonzero()[:, 0] for adapter in range(num_adapters)]


def int8_linear(x, panels, scales, out_features, bias, adapters, cu_seqlens) -> Tensor:
    """See `ztok_fast.ops.int8_linear`; all arguments are given, panels and scales with a dimension of adapters."""
    q, row_scales = quantize_rows(x)
    y = x.new_empty(x.shape[0], out_features)
    for i, rows in enumerate(rows_of_adapters(x.shape[0], panels.shape[0], adapters, cu_seqlens)):
        weight = int8_unpack(panels[i])[:out_features, : x.shape[1]]
        sums = (q[rows].double() @ weight.double().T).to(torch.int32).float()  # by way of integers, which have no -0
        y[rows] = sums * scales[i, :out_features] * row_scales[rows, None]
    return y if bias is None else y + bias


def ordered_pack(weight: Tensor) -> Tensor:
    """See `ztok_fast.ops.ordered_pack`."""
    *lead, out, width = weight.shape
    columns = round_up(out, COLUMNS)
    padded = torch.nn.functional.pad(weight.float(), (0, 0, 0, columns - out))
    return padded.view(*lead, columns // COLUMNS, COLUMNS, width).transpose(-2, -1).contiguous()


def ordered_linear(x, panels, out_features, bias) -> Tensor:
    """See `ztok_fast.ops.ordered_linear`."""
    count, width, _ = panels.shape
    weight = panels.transpose(1, 2).reshape(count * COLUMNS, width)[:out_features]
    y = x.new_zeros(x.shape[0], out_features)
    for k in range(width):
        y = fma(x[:, k, None], weight[None, :, k], y)
    return y if bias is None else y + bias


def fold_lora(weight, A, B, scale, product=ordered_linear) -> Tensor:
    """See `ztok_fast.ops.fold_lora`; `product` is a version of `ordered_linear`."""
    low_rank = product(B.float(), ordered_pack(A.float().T), A.shape[1], None)
    return weight.float() + low_rank * torch.full_like(low_rank, scale)
