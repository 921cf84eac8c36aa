"""Kernels of halting, built around exact integer prefix sums.

With the mass in multiples of threshold / 2**20, units need no sequential scan: with C the inclusive prefix sum of a row
within its sequence, C >> 20 thresholds have been passed there, and a row fires if the number goes up at it. So the scan
is a plain sum of integers, whose order does not matter, and everything else is a function of single rows:

    tile_sums_kernel   sums of tiles of rows                              (left out where there is one tile)
    prefix_kernel      prefix sums over all rows, whatever their sequence
    offsets_kernel     units per sequence and their packed offsets, one program
    rows_kernel        ends, units and weights of rows

Mode "stop" is the same scan over "this row's mass reaches the threshold". Sums are of 64-bit integers: 2**43 rows.

The backward pass needs, per row, a sum over the later rows of its sequence: `tails_kernel` makes the part of it that
each tile contributes to the tile before, `mass_gradient_kernel` adds them up in a fixed order.
"""

import triton
import triton.language as tl

ONE = tl.constexpr(1 << 20)
FRACTION_BITS = tl.constexpr(20)


@triton.jit
def quanta(mass, bits, STOP: tl.constexpr):
    """What is summed: mass in fixed point, or whether it reaches the threshold. `bits`: those of the float64 factor
    2**20 / threshold, or threshold; a kernel's own float arguments are float32."""
    value = mass.to(tl.float64)
    factor = bits.to(tl.float64, bitcast=True)
    if STOP:
        counted = (value >= factor).to(tl.int64)
    else:
        scaled = value * factor
        # NaN fails the comparison and counts as 0
        scaled = tl.minimum(tl.where(scaled > 0, scaled, 0.0), 1048576.0)
        # adding and subtracting 2**52 rounds to an integer, ties to even
        counted = ((scaled + 4503599627370496.0) - 4503599627370496.0).to(tl.int64)
    return counted


@triton.jit(do_not_specialize=["T", "bits"])
def tile_sums_kernel(mass, sums, T, bits, STOP: tl.constexpr, BT: tl.constexpr):
    """sums [tiles]: int64 sum of each tile of BT rows."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    value = tl.load(mass + rows, mask=rows < T, other=0.0)
    counted = tl.where(rows < T, quanta(value, bits, STOP), 0)
    tl.store(sums + tl.program_id(0), tl.sum(counted, 0))


@triton.jit(do_not_specialize=["T", "bits"])
def prefix_kernel(mass, sums, prefix, T, bits, STOP: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr):
    """prefix int64 [T + 1]: the sum of all rows before each. Every tile adds up the sums of the tiles before it:
    integers, so that all agree on every prefix."""
    tile = tl.program_id(0)
    rows = tile.to(tl.int64) * BT + tl.arange(0, BT)
    value = tl.load(mass + rows, mask=rows < T, other=0.0)
    counted = tl.where(rows < T, quanta(value, bits, STOP), 0)
    before = tl.zeros([BS], tl.int64)
    for block in range(0, tl.cdiv(tile, BS)):
        tiles = block * BS + tl.arange(0, BS)
        before += tl.load(sums + tiles, mask=tiles < tile, other=0)
    inclusive = tl.sum(before, 0) + tl.cumsum(counted, 0)
    tl.store(prefix + 1 + rows, inclusive, mask=rows < T)
    if tile == 0:
        tl.store(prefix, 0)


@triton.jit(do_not_specialize=["B"])
def offsets_kernel(prefix, cu_seqlens, counts, cu_units, B, STOP: tl.constexpr, BB: tl.constexpr):
    """counts [B] and cu_units [B + 1], one program."""
    total = 0
    tl.store(cu_units, 0)
    for block in range(0, tl.cdiv(B, BB)):
        sequence = block * BB + tl.arange(0, BB)
        mask = sequence < B
        start = tl.load(cu_seqlens + sequence, mask=mask, other=0)
        end = tl.load(cu_seqlens + sequence + 1, mask=mask, other=0)
        filled = end > start
        if STOP:
            count = filled.to(tl.int32)
        else:
            base = tl.load(prefix + start, mask=mask, other=0)
            whole = tl.load(prefix + end, mask=mask, other=0) - base
            # without its last row
            most = tl.load(prefix + end - 1, mask=mask & filled, other=0) - base
            fires_last = (whole >> FRACTION_BITS) > (most >> FRACTION_BITS)
            count = ((whole >> FRACTION_BITS) + tl.where(fires_last, 0, 1)).to(tl.int32)
            count = tl.where(filled, count, 0)
        tl.store(counts + sequence, count, mask=mask)
        tl.store(cu_units + 1 + sequence, total + tl.cumsum(count, 0), mask=mask)
        total += tl.sum(count, 0)


@triton.jit
def sequence_at(offsets, rows, inside, B):
    """The sequence in [0, B) that each row lies in, by bisection; only as many steps as the rows' range needs."""
    low = tl.zeros_like(rows).to(tl.int32)
    high = low + tl.maximum(B - 1, 0)
    while tl.max(tl.where(inside, high - low, 0), 0) > 0:
        middle = (low + high + 1) // 2
        at_or_after = tl.load(offsets + middle, mask=inside, other=0) <= rows
        low = tl.where(at_or_after, middle, low)
        high = tl.where(at_or_after, high, middle - 1)
    return low


@triton.jit
def row_state(prefix, cu_seqlens, rows, T, B):
    """Of rows: their sequence, whether they are its last, and the sums of their sequence up to and before them."""
    inside = rows < T
    sequence = sequence_at(cu_seqlens, rows, inside, B)
    start = tl.load(cu_seqlens + sequence, mask=inside, other=0)
    is_last = rows + 1 == tl.load(cu_seqlens + sequence + 1, mask=inside, other=0)
    base = tl.load(prefix + start, mask=inside, other=0)
    upto = tl.load(prefix + rows + 1, mask=inside, other=0) - base
    before = tl.load(prefix + rows, mask=inside, other=0) - base
    return sequence, is_last, upto, before


@triton.jit(do_not_specialize=["T", "B", "bits"])
def rows_kernel(
    mass, prefix, cu_seqlens, cu_units, weights, ends, unit, T, B, bits, STOP: tl.constexpr, BT: tl.constexpr
):
    """ends, unit and weights of BT rows. `bits`: those of the float64 threshold / 2**20."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    inside = rows < T
    sequence, is_last, upto, before = row_state(prefix, cu_seqlens, rows, T, B)
    first_unit = tl.load(cu_units + sequence, mask=inside, other=0)
    dtype = weights.dtype.element_ty
    if STOP:
        in_unit = before == 0
        ending = in_unit & (is_last | (upto > 0))
        value = tl.load(mass + rows, mask=inside, other=0.0).to(dtype)
        value = tl.where(value == value, value, 0.0)
        # infinity counts as the largest number
        largest = 3.4028234663852886e38 if dtype == tl.float32 else 1.7976931348623157e308
        own = tl.where(in_unit, tl.minimum(tl.maximum(value, -largest), largest), 0.0)
        carried = tl.zeros_like(own)
        index = tl.where(in_unit, first_unit, -1)
    else:
        fires = (upto >> FRACTION_BITS) > (before >> FRACTION_BITS)
        ending = fires | is_last
        share = tl.where(fires, ONE - (before & (ONE - 1)), upto - before)
        rest = tl.where(fires & (is_last == 0), upto & (ONE - 1), 0)
        quantum = bits.to(tl.float64, bitcast=True)
        own = (share.to(tl.float64) * quantum).to(dtype)
        carried = (rest.to(tl.float64) * quantum).to(dtype)
        index = first_unit + (before >> FRACTION_BITS).to(tl.int32)
    tl.store(ends + rows, ending, mask=inside)
    tl.store(unit + rows, index, mask=inside)
    tl.store(weights + 2 * rows, own, mask=inside)
    tl.store(weights + 2 * rows + 1, carried, mask=inside)


@triton.jit
def passed_on(weight_grads, prefix, cu_seqlens, rows, T, B):
    """Of rows: what their gradients hand to the rows before them and to themselves (see the reference), float64; and
    their own weights' gradient, whether they fire, whether they are the last of their sequence, their sequence."""
    sequence, is_last, upto, before = row_state(prefix, cu_seqlens, rows, T, B)
    fires = (upto >> FRACTION_BITS) > (before >> FRACTION_BITS)
    own = tl.load(weight_grads + 2 * rows, mask=rows < T, other=0.0).to(tl.float64)
    carried = tl.load(weight_grads + 2 * rows + 1, mask=rows < T, other=0.0).to(tl.float64)
    to_exclusive = tl.where(fires, -own, 0.0)
    to_inclusive = tl.where(fires & (is_last == 0), carried, 0.0)
    return to_exclusive + to_inclusive, to_inclusive, own, fires, is_last, sequence


@triton.jit
def add_in_segment(later, later_ends, value, ends):
    """Combination of a sum over later rows with earlier ones: a row that ends its sequence forgets what is later."""
    return tl.where(ends > 0, value, later + value), later_ends | ends


@triton.jit
def sums_over_later(weight_grads, prefix, cu_seqlens, T, B, BT: tl.constexpr):
    """Rows of a tile; the sums of `passed_on` over the rows after each, within its sequence and up to the row after the
    tile; whether a row ends its sequence."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    handed, _, _, _, _, _ = passed_on(weight_grads, prefix, cu_seqlens, rows + 1, T, B)
    sequence = sequence_at(cu_seqlens, rows, rows < T, B)
    end = tl.load(cu_seqlens + sequence + 1, mask=rows < T, other=0)
    is_last = (rows + 1 >= end).to(tl.int32)
    value = tl.where(is_last > 0, 0.0, handed)
    sums, _ = tl.associative_scan((value, is_last), 0, add_in_segment, reverse=True)
    return rows, sums, is_last, end


@triton.jit(do_not_specialize=["T", "B"])
def tails_kernel(weight_grads, prefix, cu_seqlens, tails, T, B, BT: tl.constexpr):
    """tails float64 [tiles]: of each tile's first row the sum over later rows, as far as the tile reaches."""
    rows, sums, _, _ = sums_over_later(weight_grads, prefix, cu_seqlens, T, B, BT)
    first = tl.program_id(0).to(tl.int64) * BT
    tl.store(tails + tl.program_id(0), tl.sum(tl.where(rows == first, sums, 0.0), 0))


@triton.jit(do_not_specialize=["T", "B"])
def mass_gradient_kernel(
    weight_grads, prefix, cu_seqlens, tails, grad, T, B, STOP: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr
):
    """grad [T] of BT rows: direct parts, and the sums over later rows of the sequence."""
    tile = tl.program_id(0)
    rows = tile.to(tl.int64) * BT + tl.arange(0, BT)
    if STOP:
        _, _, _, before = row_state(prefix, cu_seqlens, rows, T, B)
        own = tl.load(weight_grads + 2 * rows, mask=rows < T, other=0.0)
        result = tl.where(before == 0, own, 0.0).to(tl.float64)
    else:
        _, to_inclusive, own, fires, _, _ = passed_on(weight_grads, prefix, cu_seqlens, rows, T, B)
        rows, later, is_last, end = sums_over_later(weight_grads, prefix, cu_seqlens, T, B, BT)
        # the sequence of the tile's last row may go on in the tiles up to `last_tile`
        last_row = (tile.to(tl.int64) + 1) * BT - 1
        furthest = tl.max(tl.where(rows < T, end, 0), 0).to(tl.int64)
        goes_on = furthest - 1 > last_row
        last_tile = tl.where(goes_on, (furthest - 1) // BT, tile).to(tl.int32)
        beyond = tl.zeros([BS], tl.float64)
        for block in range(0, tl.cdiv(last_tile - tile, BS)):
            tiles = tile + 1 + block * BS + tl.arange(0, BS)
            beyond += tl.load(tails + tiles, mask=tiles <= last_tile, other=0.0)
        later += tl.where(goes_on & (end == furthest), tl.sum(beyond, 0), 0.0)
        result = tl.where(fires, 0.0, own) + to_inclusive + later
    if grad.dtype.element_ty != tl.float64:
        result = result.to(tl.float32)  # the interpreter has no float64 -> bfloat16
    tl.store(grad + rows, result.to(grad.dtype.element_ty), mask=rows < T)
