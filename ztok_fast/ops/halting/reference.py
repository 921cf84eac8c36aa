"""Plain PyTorch halting and integration: the definition that every other backend is tested against."""

import torch

from ztok_fast.ops.checks import compute_dtype
from ztok_fast.ops.op import vjp
from ztok_fast.ops.segments import exclusive_cumsum, segment_sum, sequence_of
from ztok_fast.ops.straight_through import straight_through

# the mass is counted in multiples of threshold / 2**20, so that its prefix sums are exact integers
FRACTION_BITS = 20
ONE = 1 << FRACTION_BITS


def _fixed_point(mass: torch.Tensor, threshold: float) -> torch.Tensor:
    """Mass in multiples of threshold / 2**20, int64 [T]; NaN counts as 0, the range [0, threshold] is enforced."""
    scaled = torch.round(mass.double() * (ONE / threshold))
    return torch.nan_to_num(scaled, nan=0.0).clamp(0, ONE).long()


def _sequences(cu_seqlens, rows):
    """First row of the sequence of each row, and whether a row is the last of its sequence; both [T]."""
    row = torch.arange(rows, device=cu_seqlens.device)
    sequence = sequence_of(cu_seqlens, row)
    return cu_seqlens[sequence].long(), row + 1 == cu_seqlens[sequence + 1]


def _accumulate(mass, cu_seqlens, threshold):
    """Fixed-point mass, its inclusive prefix sum within the sequence, rows that fire, rows that carry; all [T]."""
    first, is_last = _sequences(cu_seqlens, mass.shape[0])
    quanta = _fixed_point(mass, threshold)
    before = exclusive_cumsum(quanta)
    prefix = before[1:] - before[first]
    fired = (prefix >> FRACTION_BITS) > ((prefix - quanta) >> FRACTION_BITS)
    return quanta, prefix, fired, fired & ~is_last, is_last


def _in_unit(mass, cu_seqlens, threshold):
    """mode="stop": rows up to the first whose mass reaches the threshold, and those that end a unit; all [T]."""
    first, is_last = _sequences(cu_seqlens, mass.shape[0])
    reached = mass.double() >= threshold
    before = exclusive_cumsum(reached)
    open_ = before[:-1] == before[first]
    return open_, open_ & (reached | is_last)


def halting_units(mass, cu_seqlens, threshold, mode):
    """See `ztok_fast.ops.halting_units`; returns weights, ends, unit, counts and cu_units."""
    dtype = compute_dtype(mass)
    with torch.no_grad():
        if mode == "fire":
            quanta, prefix, fired, carries, is_last = _accumulate(mass, cu_seqlens, threshold)
            ends = fired | is_last
            own = torch.where(fired, ONE - ((prefix - quanta) & (ONE - 1)), quanta)
            carried = torch.where(carries, prefix & (ONE - 1), 0)
            weights = (torch.stack([own, carried], 1).double() * (threshold / ONE)).to(dtype)
            unit = exclusive_cumsum(ends)[:-1]
        else:
            open_, ends = _in_unit(mass, cu_seqlens, threshold)
            own = torch.where(open_, torch.nan_to_num(mass.to(dtype)), 0)
            weights = torch.stack([own, torch.zeros_like(own)], 1)
            unit = torch.where(open_, exclusive_cumsum(ends)[:-1], -1)
        cu_units = exclusive_cumsum(ends)[cu_seqlens.long()]
    weights = straight_through(weights, _weights_before_rounding(mass, cu_seqlens, threshold, mode))
    return weights, ends, unit.int(), cu_units.diff().int(), cu_units.int()


def _weights_before_rounding(mass, cu_seqlens, threshold, mode):
    """The weights [T, 2] up to constants, as functions of the mass that autograd differentiates.

    In "fire", the own share is the mass where the row does not fire and -C[t - 1] where it does, the carried share is
    C[t], with C the prefix sum within the sequence.
    """
    with torch.no_grad():
        if mode == "fire":
            _, _, fired, carries, _ = _accumulate(mass, cu_seqlens, threshold)
            first, _ = _sequences(cu_seqlens, mass.shape[0])
        else:
            open_, _ = _in_unit(mass, cu_seqlens, threshold)
    dtype = compute_dtype(mass)
    if mode == "stop":
        own = torch.where(open_, mass, 0).to(dtype)
        return torch.stack([own, torch.zeros_like(own)], 1)
    wide = mass.double()
    prefix = _sums_within(wide, first)
    own = torch.where(fired, wide - prefix, wide)
    return torch.stack([own, torch.where(carries, prefix, 0)], 1).to(dtype)


def _sums_within(values, first):
    """Inclusive prefix sums [T] of `values` within sequences, of which `first` [T] is the first row.

    By doubling. The difference of two sums over all rows would take less work, but its gradient would carry the
    rounding of one sequence into the others.
    """
    row = torch.arange(values.shape[0], device=values.device)
    step = 1
    while step < values.shape[0]:
        earlier = torch.cat([values.new_zeros(step), values[:-step]])
        values = values + torch.where(row - step >= first, earlier, 0)
        step *= 2
    return values


def halting_units_backward(mass, cu_seqlens, grad_weights, threshold, mode):
    """Gradient of the mass [T] from that of the weights [T, 2]."""
    return vjp(lambda m: _weights_before_rounding(m, cu_seqlens, threshold, mode), (mass,), (grad_weights,))[0]


def carries_on(unit, ends, cu_units):
    """Rows [T] whose remainder goes to a next unit of the same sequence."""
    sequence = sequence_of(cu_units, unit)
    last = cu_units[(sequence + 1).clamp(max=cu_units.shape[0] - 1)]
    return ends & (unit >= 0) & (unit + 1 < last)


def unit_indices(unit, ends, cu_units, total_units):
    """Per row the unit of its own share and of its carried share, int64 [T]; `total_units` stands for none.

    Units past `total_units` count as none, so that a caller's wrong total cannot write out of bounds where values are
    not checked.
    """
    own = torch.where(unit >= 0, unit.long(), total_units)
    carried = torch.where(carries_on(unit, ends, cu_units), unit.long() + 1, total_units)
    return own.clamp(max=total_units), carried.clamp(max=total_units)


def _unit_sums(values, weights, own, carried, total_units):
    """Sums [total_units, D] over each unit of weights * values [T, D]. Rows of no unit do not count, NaN or not."""

    def sums(index, share):
        counted = torch.where((index < total_units)[:, None], values, 0)
        return segment_sum(counted * share, index, total_units)

    return sums(own, weights[:, :1]) + sums(carried, weights[:, 1:])


def integrate_units(rows, weights, unit, ends, cu_units, total_units):
    """See `ztok_fast.ops.integrate_units`."""
    dtype = compute_dtype(rows, weights)
    own, carried = unit_indices(unit, ends, cu_units, total_units)
    weights = weights.to(dtype)
    totals = _unit_sums(weights.new_ones(weights.shape[0], 1), weights, own, carried, total_units)
    sums = _unit_sums(rows.to(dtype), weights, own, carried, total_units)
    # the division is by 1 where there is no weight: 0 / 0 would have no gradient
    has_weight = totals > 0
    return torch.where(has_weight, sums / torch.where(has_weight, totals, 1), 0).to(rows.dtype)


def integrate_units_backward(rows, weights, unit, ends, cu_units, means, grad):
    """Gradients of the rows [T, D] and of the weights [T, 2] from that of the means [K, D]."""

    def integrate(rows, weights):
        return integrate_units(rows, weights, unit, ends, cu_units, means.shape[0])

    return tuple(vjp(integrate, (rows, weights), (grad,)))
