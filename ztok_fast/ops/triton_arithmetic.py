"""The arithmetic of docs/determinism.md in Triton: the same bits on every device.

What calls it is launched without fusion: only `tl.fma` rounds once.
"""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """The specified exp of float32, for x <= 88."""
    clamped = tl.maximum(x, -87.0)
    shifted = tl.fma(clamped, tl.full(x.shape, 1.44269504, tl.float32), tl.full(x.shape, 12582912.0, tl.float32))
    n = shifted - 12582912.0
    r = tl.fma(n, tl.full(x.shape, -0.693359375, tl.float32), clamped)
    r = tl.fma(n, tl.full(x.shape, 2.12194440e-4, tl.float32), r)
    p = tl.full(x.shape, 1.9875691500e-4, tl.float32)
    p = tl.fma(p, r, tl.full(x.shape, 1.3981999507e-3, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 8.3334519073e-3, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 4.1665795894e-2, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 1.6666665459e-1, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 5.0000001201e-1, tl.float32))
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    result = tl.where(x < -87.0, 0.0, (tl.fma(p, r * r, r) + 1.0) * power)
    return tl.where(x == x, result, x)  # the maximum above is a number even where x is NaN
