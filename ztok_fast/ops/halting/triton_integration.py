"""Kernels of integration over units.

They start from a table of units, int64 [K] each: `first_rows[k]` is twice the first row that unit k owns, plus 1 if the
row before it carries its remainder into the unit; `end_rows[k]` is the row after the last one it owns. Entries past the
number of units are not read; a unit without rows has zeros.

    unit_rows_kernel      the table, from the units of rows
    unit_means_kernel     a program makes one unit's mean in one tile of columns
    unit_totals_kernel    1 / sum of weights of units, for the backward pass
    row_gradients_kernel  a program makes the gradients of a few rows and of their weights

No atomics: every element is written by one program, every sum has one order. Accumulation is in float32, or in float64
with WIDE.
"""

import triton
import triton.language as tl

from ztok_fast.ops.halting.triton_kernels import sequence_at


@triton.jit(do_not_specialize=["T", "B", "total_units"])
def unit_rows_kernel(unit, ends, cu_units, first_rows, end_rows, T, B, total_units, BT: tl.constexpr):
    """The table of units from the units and ends of BT rows."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    inside = rows < T
    index = tl.load(unit + rows, mask=inside, other=-1)
    previous = tl.load(unit + rows - 1, mask=inside & (rows > 0), other=-1)
    ending = tl.load(ends + rows, mask=inside, other=0) != 0
    there = (index >= 0) & (index < total_units)
    begins = there & (index != previous)
    # every unit but the first of its sequence gets what the row before it carries
    sequence = sequence_at(cu_units, index, begins, B)
    carried_into = (index != tl.load(cu_units + sequence, mask=begins, other=0)) & (rows > 0)
    tl.store(first_rows + index, 2 * rows + carried_into.to(tl.int64), mask=begins)
    tl.store(end_rows + index, rows + 1, mask=there & ending)


@triton.jit
def rows_of_unit(first_rows, end_rows, unit, mask):
    """First row that the unit owns, the row from which it gets anything, and the row after its last."""
    packed = tl.load(first_rows + unit, mask=mask, other=0)
    first = packed >> 1
    return first, first - (packed & 1), tl.load(end_rows + unit, mask=mask, other=0)


@triton.jit
def divide(a, b, WIDE: tl.constexpr):
    """a / b, 0 where b is not above 0; correctly rounded, so that the mean of equal rows is that row."""
    divisor = tl.where(b > 0, b, 1.0)
    quotient = a / divisor if WIDE else tl.div_rn(a, divisor)
    return tl.where(b > 0, quotient, 0.0)


@triton.jit(do_not_specialize=["B", "total_units"])
def unit_means_kernel(
    rows, weights, first_rows, end_rows, cu_units, means, B, total_units,
    D: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """means [total_units, D]. Grid: units, tiles of BC columns."""
    unit = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    dtype = tl.float64 if WIDE else tl.float32
    first, start, end = rows_of_unit(first_rows, end_rows, unit, unit < tl.load(cu_units + B))
    sums = tl.zeros([BC], dtype)
    totals = tl.zeros([BC], dtype)
    for block in range(0, tl.cdiv(end - start, BR)):
        row = start + block * BR + tl.arange(0, BR)
        weight = tl.load(weights + 2 * row + (row < first).to(tl.int64), mask=row < end, other=0.0).to(dtype)
        mask = (row < end)[:, None] & (columns < D)[None, :]
        value = tl.load(rows + row[:, None] * D + columns[None, :], mask=mask, other=0.0).to(dtype)
        sums += tl.sum(weight[:, None] * value, 0)
        # the same sum in the same order, so that the mean of equal rows is that row
        totals += tl.sum(tl.broadcast_to(weight[:, None], (BR, BC)), 0)
    mean = divide(sums, totals, WIDE)
    tl.store(means + unit * D + columns, mean.to(means.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["B", "total_units"])
def unit_totals_kernel(
    weights, first_rows, end_rows, cu_units, inverse, B, total_units,
    WIDE: tl.constexpr, BU: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """inverse [total_units]: 1 / sum of weights of BU units, 0 where there is none."""
    unit = tl.program_id(0).to(tl.int64) * BU + tl.arange(0, BU)
    there = unit < tl.minimum(tl.load(cu_units + B), total_units)
    first, start, end = rows_of_unit(first_rows, end_rows, unit, there)
    dtype = tl.float64 if WIDE else tl.float32
    # Summed over BR after the loop: Triton 3.6 does not compile a loop that carries a row sum which is used twice.
    totals = tl.zeros([BU, BR], dtype)
    for block in range(0, tl.cdiv(tl.max(end - start, 0), BR)):
        row = start[:, None] + block * BR + tl.arange(0, BR)[None, :]
        offset = 2 * row + (row < first[:, None]).to(tl.int64)
        totals += tl.load(weights + offset, mask=row < end[:, None], other=0.0).to(dtype)
    total = tl.sum(totals, 1)
    one = tl.full([BU], 1.0, dtype)
    tl.store(inverse + unit, divide(one, total, WIDE), mask=unit < total_units)


@triton.jit
def share_gradient(grad, means, unit, factor, value, columns, has, D: tl.constexpr):
    """factor * grad and the products grad * (row - mean) of one tile; zeros in rows without such a unit."""
    mask = has[:, None] & (columns < D)[None, :]
    at = unit[:, None] * D + columns[None, :]
    g = tl.load(grad + at, mask=mask, other=0.0).to(value.dtype)
    mean = tl.load(means + at, mask=mask, other=0.0).to(value.dtype)
    return factor[:, None] * g, tl.where(mask, g * (value - mean), 0.0)


@triton.jit(do_not_specialize=["T", "B", "total_units"])
def row_gradients_kernel(
    rows, weights, unit, ends, first_rows, cu_units, inverse, means, grad, grad_end_rows, grad_rows, grad_weights,
    T, B, total_units,
    D: tl.constexpr, WIDE: tl.constexpr, END_ROWS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of BR rows and their weights. END_ROWS: those of the rows that end a unit are added."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row < T
    dtype = tl.float64 if WIDE else tl.float32
    own = tl.load(unit + row, mask=inside, other=-1).to(tl.int64)
    ending = tl.load(ends + row, mask=inside, other=0) != 0
    units = tl.minimum(tl.load(cu_units + B), total_units)
    has_own = (own >= 0) & (own < units)
    ends_one = has_own & ending
    # the next unit, where it begins with the next row and this row carries into it
    carries = ends_one & (own + 1 < units)
    carries = carries & (tl.load(first_rows + own + 1, mask=carries, other=0) == 2 * row + 3)
    own_inverse = tl.load(inverse + own, mask=has_own, other=0.0)
    next_inverse = tl.load(inverse + own + 1, mask=carries, other=0.0)
    own_factor = own_inverse * tl.load(weights + 2 * row, mask=inside, other=0.0).to(dtype)
    next_factor = next_inverse * tl.load(weights + 2 * row + 1, mask=inside, other=0.0).to(dtype)
    own_dot = tl.zeros([BR], dtype)
    next_dot = tl.zeros([BR], dtype)
    for tile in range(0, tl.cdiv(D, BC)):
        columns = tile * BC + tl.arange(0, BC)
        mask = inside[:, None] & (columns < D)[None, :]
        value = tl.load(rows + row[:, None] * D + columns[None, :], mask=mask, other=0.0).to(dtype)
        result, products = share_gradient(grad, means, own, own_factor, value, columns, own_inverse > 0, D)
        own_dot += tl.sum(products, 1)
        part, products = share_gradient(grad, means, own + 1, next_factor, value, columns, next_inverse > 0, D)
        next_dot += tl.sum(products, 1)
        result += part
        if END_ROWS:
            at = own[:, None] * D + columns[None, :]
            result += tl.load(grad_end_rows + at, mask=ends_one[:, None] & (columns < D)[None, :], other=0.0)
        at = row[:, None] * D + columns[None, :]
        tl.store(grad_rows + at, result.to(grad_rows.dtype.element_ty), mask=mask)
    tl.store(grad_weights + 2 * row, (own_inverse * own_dot).to(grad_weights.dtype.element_ty), mask=inside)
    tl.store(grad_weights + 2 * row + 1, (next_inverse * next_dot).to(grad_weights.dtype.element_ty), mask=inside)
