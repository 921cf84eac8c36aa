"""Triton kernels of the engine's linear layers. They are launched without fusion: only `tl.fma` rounds once."""

import triton
import triton.language as tl


@triton.jit
def rounded(x):
    """The nearest integer of |x| below 2^22, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantize_rows_kernel(x, q, scales, K, K64, BK: tl.constexpr):
    """One row: q int8 [M, K64], padding 0; scales float32 [M]. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    most = tl.zeros([BK], tl.int32)
    for start in range(0, K, BK):
        v = tl.load(x + row * K + start + k, mask=start + k < K, other=0.0)
        # bits of absolute values are in the order of the values, infinity and then NaN above all others
        most = tl.maximum(most, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.max(most, 0)
    largest = bits.to(tl.float32, bitcast=True)
    usable = (bits < 0x7F800000) & (largest >= 2.0**-100)
    divisor = tl.where(usable, largest, 1.0)
    factor = tl.where(usable, tl.math.div_rn(127.0, divisor), 0.0)
    for start in range(0, K64, BK):
        v = tl.load(x + row * K + start + k, mask=start + k < K, other=0.0)
        value = rounded(tl.where(usable, v, 0.0) * factor)
        tl.store(q + row * K64 + start + k, value.to(tl.int8), mask=start + k < K64)
    scale = tl.where(usable, tl.math.div_rn(divisor, 127.0), 0.0)
    tl.store(scales + row, tl.where(bits < 0x7F800000, scale, float("nan")))


@triton.jit
def int8_linear_kernel(
    q, row_scales, panels, weight_scales, bias, order, block_adapters, block_rows, block_ends, y, N, K4, P,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows of one adapter by BN channels. Grid: blocks of rows, blocks of channels.

    `q` int32 [M, K4] and `panels` int32 [n, P, K4, 16] hold 4 inputs in an integer. `order` int64 [M] sorts the rows by
    adapter; block i takes rows order[block_rows[i] : min(block_rows[i] + BM, block_ends[i])] under block_adapters[i].
    """
    block = tl.program_id(0)
    adapter = tl.load(block_adapters + block).to(tl.int64)
    at = tl.load(block_rows + block) + tl.arange(0, BM)
    inside = at < tl.load(block_ends + block)
    row = tl.load(order + at, mask=inside, other=0)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    channel = (adapter * P + c // 16) * (K4 * 16) + c % 16
    here = c < P * 16
    sums = tl.zeros([BM, BN], tl.int32)
    for start in range(0, K4, BK):
        k = start + tl.arange(0, BK)
        deep = k < K4
        rows = tl.load(q + row[:, None] * K4 + k[None, :], mask=inside[:, None] & deep[None, :], other=0)
        place = channel[None, :] + (k * 16)[:, None]
        weights = tl.load(panels + place, mask=deep[:, None] & here[None, :], other=0) ^ -2139062144  # 0x80808080
        # every fourth input in turn, of both: integer sums have no order
        for byte in tl.static_range(4):
            sums = tl.dot((rows >> 8 * byte).to(tl.int8), (weights >> 8 * byte).to(tl.int8), sums, out_dtype=tl.int32)
    mask = c < N
    scale = tl.load(weight_scales + adapter * P * 16 + c, mask=mask, other=0.0)
    row_scale = tl.load(row_scales + row, mask=inside, other=0.0)
    result = sums.to(tl.float32) * scale[None, :] * row_scale[:, None]
    if bias is not None:
        result += tl.load(bias + c, mask=mask, other=0.0)[None, :]
    tl.store(y + row[:, None] * N + c[None, :], result, mask=inside[:, None] & mask[None, :])


@triton.jit(do_not_specialize=["M"])
def ordered_linear_kernel(x, panels, bias, y, M, N, K, BM: tl.constexpr, BN: tl.constexpr):
    """BM rows by BN channels, a chain of fma for each. Grid: blocks of rows, blocks of channels."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    channel = (c // 16).to(tl.int64) * (K * 16) + c % 16
    mask = c < N
    sums = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K):
        a = tl.load(x + row * K + k, mask=row < M, other=0.0)
        b = tl.load(panels + channel + k * 16, mask=mask, other=0.0)
        left = tl.broadcast_to(a[:, None], [BM, BN])
        sums = tl.fma(left, tl.broadcast_to(b[None, :], [BM, BN]), sums)
    if bias is not None:
        sums += tl.load(bias + c, mask=mask, other=0.0)[None, :]
    tl.store(y + row[:, None] * N + c[None, :], sums, mask=(row < M)[:, None] & mask[None, :])
