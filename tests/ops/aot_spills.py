"""A kernel that cannot stay in registers, for the test of the test."""

import triton
import triton.language as tl


@triton.jit
def spill_kernel(x, y, B: tl.constexpr):
    """One warp holds 4 x 64 x 64 numbers."""
    i = tl.arange(0, B)
    at = i[:, None] * B + i[None, :]
    a, b = tl.load(x + at), tl.load(x + B * B + at)
    total = tl.zeros([B, B], tl.float32)
    for step in range(0, 9):
        total += a * b + step
        a = a * total + b
        b = b * total + a
    tl.store(y + at, total + a + b)
