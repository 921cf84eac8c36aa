"""Kernels of `quantize_ragged` around the residual search.

    project_units_kernel  gathers the end rows and means of some units, projects them on the tensor cores, normalises
    normalise_kernel      the last step of it for latents wider than one tile
    unnormalise_kernel    backward of that step

A block of units past the last one writes zeros and does nothing else. A unit's rows are read where they are needed, in
steps of the width; its mean is never stored. Float sums have one order: no atomics.
"""

import triton
import triton.language as tl

from ztok_fast.ops.halting.triton_integration import divide, rows_of_unit
from ztok_fast.ops.halting.triton_kernels import sequence_at

# added to the mean square of a latent before it is normalised, as in the reference
RMS_EPS = tl.constexpr(1e-6)


@triton.jit
def weight_of(weights, row, first, end):
    """Shares of rows in units that own the rows [first, end): of the row before, what it carries; 0 from `end` on."""
    return tl.load(weights + 2 * row + (row < first).to(tl.int64), mask=row < end, other=0.0)


@triton.jit
def normalise(latents, D: tl.constexpr):
    """Rows [BM, BD], zeros past D, divided by their root mean square, and the factors."""
    scale = 1.0 / tl.sqrt(tl.sum(latents * latents, 1) / D + RMS_EPS)
    return latents * scale[:, None], scale


@triton.jit(do_not_specialize=["B", "L", "total_units"])
def project_units_kernel(
    hidden, weights, first_rows, end_rows, cu_units, end_weight, mean_weight, levels, latents, scales, unit_levels,
    B, L, total_units,
    HIDDEN: tl.constexpr, D: tl.constexpr, LEVELS: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """latents [total_units, D] of BM units in BN columns; WHOLE: BN covers D, and they are normalised. Also the
    residual levels of the units, 0 past the last one. Grid: blocks of units, of columns."""
    unit = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    units = tl.minimum(tl.load(cu_units + B), total_units)
    there = unit < units
    first, start, end = rows_of_unit(first_rows, end_rows, unit, there)
    longest = tl.max(end - start, 0)
    total = tl.zeros([BM], tl.float32)
    for i in range(0, longest):
        total += weight_of(weights, start + i, first, end)
    acc = tl.zeros([BM, BN], tl.float32)
    # no step where no unit of the block exists
    steps = tl.where(longest > 0, tl.cdiv(HIDDEN, BK), 0)
    for step in range(0, steps):
        k = step * BK + tl.arange(0, BK)
        in_width = (k < HIDDEN)[None, :]
        at = (end - 1)[:, None] * HIDDEN + k[None, :]
        end_row = tl.load(hidden + at, mask=(end > 0)[:, None] & in_width, other=0.0).to(tl.float32)
        sums = tl.zeros([BM, BK], tl.float32)
        for i in range(0, longest):
            row = start + i
            weight = weight_of(weights, row, first, end)
            mask = (row < end)[:, None] & in_width
            value = tl.load(hidden + row[:, None] * HIDDEN + k[None, :], mask=mask, other=0.0).to(tl.float32)
            sums += weight[:, None] * value
        mean = divide(sums, tl.broadcast_to(total[:, None], (BM, BK)), False)
        # both operands have the summed dimension innermost, as wgmma wants it
        of_weight = columns[:, None] * HIDDEN + k[None, :]
        mask = (columns < D)[:, None] & in_width
        weight_tile = tl.load(end_weight + of_weight, mask=mask, other=0.0).to(tl.float32)
        acc = tl.dot(end_row, tl.trans(weight_tile), acc, input_precision="tf32x3")
        weight_tile = tl.load(mean_weight + of_weight, mask=mask, other=0.0).to(tl.float32)
        acc = tl.dot(mean, tl.trans(weight_tile), acc, input_precision="tf32x3")
    if WHOLE:
        acc, scale = normalise(acc, D)
        tl.store(scales + unit, scale, mask=unit < total_units)
    mask = (unit < total_units)[:, None] & (columns < D)[None, :]
    tl.store(latents + unit[:, None] * D + columns[None, :], acc, mask=mask)
    if LEVELS:
        sequence = sequence_at(cu_units, unit, there, B)
        used = tl.load(levels + sequence, mask=there, other=0).to(tl.int32)
    else:
        used = tl.where(there, L, 0)
    if tl.program_id(1) == 0:
        tl.store(unit_levels + unit, used, mask=unit < total_units)


@triton.jit(do_not_specialize=["M"])
def normalise_kernel(latents, scales, M, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """BM rows in place."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BD)
    mask = (rows < M)[:, None] & (columns < D)[None, :]
    at = latents + rows[:, None] * D + columns[None, :]
    values, scale = normalise(tl.load(at, mask=mask, other=0.0), D)
    tl.store(at, values, mask=mask)
    tl.store(scales + rows, scale, mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def unnormalise_kernel(
    latents, scales, grad_latents, from_codes, grad, M, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    """Gradient of what was normalised to BM latents: z = s r with s = (|r|^2 / D + eps)^(-1/2) gives
    s (g - z <g, z> / D), g the sum of both gradients of z."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BD)
    mask = (rows < M)[:, None] & (columns < D)[None, :]
    at = rows[:, None] * D + columns[None, :]
    z = tl.load(latents + at, mask=mask, other=0.0)
    g = tl.load(grad_latents + at, mask=mask, other=0.0) + tl.load(from_codes + at, mask=mask, other=0.0)
    scale = tl.load(scales + rows, mask=rows < M, other=0.0)
    result = scale[:, None] * (g - z * (tl.sum(g * z, 1) / D)[:, None])
    tl.store(grad + at, result, mask=mask)
