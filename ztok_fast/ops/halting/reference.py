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


def halting_units(mass, cu_seqlens, threshold, mode):
    """See `ztok_fast.ops.halting_units`; returns weights, ends, unit, counts and cu_units.

    Up to constants, in "fire" the own share is the mass where the row does not fire and -C[t - 1] where it does, the
    carried share C[t], with C the prefix sum within the sequence: that is what autograd differentiates.
    """
    dtype = compute_dtype(mass)
    row = torch.arange(mass.shape[0], device=mass.device)
    sequence = sequence_of(cu_seqlens, row)
    first, is_last = cu_seqlens[sequence].long(), row + 1 == cu_seqlens[sequence + 1]
    if mode == "fire":
        quanta = _fixed_point(mass.detach(), threshold)
        before = exclusive_cumsum(quanta)
        prefix = before[1:] - before[first]
        fired = (prefix >> FRACTION_BITS) > ((prefix - quanta) >> FRACTION_BITS)
        carries, ends = fired & ~is_last, fired | is_last
        own = torch.where(fired, ONE - ((prefix - quanta) & (ONE - 1)), quanta)
        weights = torch.stack([own, torch.where(carries, prefix & (ONE - 1), 0)], 1).double() * (threshold / ONE)
        unit = exclusive_cumsum(ends)[:-1]
        sums = _sums_within(mass.double(), first)
        through = [torch.where(fired, mass - sums, mass.double()), torch.where(carries, sums, 0)]
    else:
        reached = mass.detach().double() >= threshold
        before = exclusive_cumsum(reached)
        in_unit = before[:-1] == before[first]
        ends = in_unit & (reached | is_last)
        own = torch.where(in_unit, torch.nan_to_num(mass.detach().to(dtype)), 0)
        weights = torch.stack([own, torch.zeros_like(own)], 1)
        unit = torch.where(in_unit, exclusive_cumsum(ends)[:-1], -1)
        through = [torch.where(in_unit, mass, 0), torch.zeros_like(mass)]
    cu_units = exclusive_cumsum(ends)[cu_seqlens.long()]
    weights = straight_through(weights.to(dtype), torch.stack(through, 1).to(dtype))
    return weights, ends, unit.int(), cu_units.diff().int(), cu_units.int()


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
    return vjp(lambda m: halting_units(m, cu_seqlens, threshold, mode)[0], (mass,), (grad_weights,))[0]


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
