"""The arithmetic of docs/determinism.md in plain PyTorch: the same bits on every device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32 tensors, rounded once.

    The product is exact in float64. The sum is rounded to odd there (Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums", 2008): where it is not exact and its last bit is even, it becomes its neighbour on the
    side of the exact sum. Rounding that to float32 is rounding the exact sum.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = (total.view(torch.int64) & 1) == 0
    neighbour = torch.nextafter(total, torch.where(error > 0, torch.inf, -torch.inf).to(total))
    odd = torch.where(total.isfinite() & (error != 0) & even, neighbour, total)
    return odd.float()


def exp(x: Tensor) -> Tensor:
    """The specified exp of float32, for x <= 88."""
    constant = functools.partial(torch.tensor, dtype=torch.float32, device=x.device)
    clamped = x.clamp(min=-87)
    n = fma(clamped, constant(1.44269504), constant(12582912.0)) - 12582912.0
    r = fma(n, constant(-0.693359375), clamped)
    r = fma(n, constant(2.12194440e-4), r)
    p = torch.full_like(r, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, constant(coefficient))
    power = (n.int() + 127 << 23).view(torch.float32)
    return torch.where(x < -87, 0, (fma(p, r * r, r) + 1) * power)
