"""Plain PyTorch halting and integration: the definition that every other backend is tested against."""

import torch

from ztok_fast.ops.checks import compute_dtype
from ztok_fast.ops.segments import exclusive_cumsum, segment_sum, sequence_of

# the mass is counted in multiples of threshold / 2**20, so that its prefix sums are exact integers
FRACTION_BITS = 20
ONE = 1 << FRACTION_BITS


def _fixed_point(mass: torch.Tensor, threshold: float) -> torch.Tensor:
    """Mass in multiples of threshold / 2**20, int64 [T]; NaN counts as 0, the range [0, threshold] is enforced."""
    scaled = torch.round(mass.double() * (ONE / threshold))
    return torch.nan_to_num(scaled, nan=0.0).clamp(0, ONE).long()


def _accumulate(mass, cu_seqlens, threshold):
    """Fixed-point mass, its inclusive prefix sum within the sequence, rows that fire, rows that carry; all [T]."""
    rows = torch.arange(mass.shape[0], device=mass.device)
    sequence = sequence_of(cu_seqlens, rows)
    is_last = rows + 1 == cu_seqlens[sequence + 1]
    quanta = _fixed_point(mass, threshold)
    before = exclusive_cumsum(quanta)
    prefix = before[1:] - before[cu_seqlens[sequence].long()]
    fired = (prefix >> FRACTION_BITS) > ((prefix - quanta) >> FRACTION_BITS)
    return quanta, prefix, fired, fired & ~is_last, is_last


def _in_unit(mass, cu_seqlens, threshold):
    """mode="stop": rows up to the first whose mass reaches the threshold, and those that end a unit; all [T]."""
    rows = torch.arange(mass.shape[0], device=mass.device)
    sequence = sequence_of(cu_seqlens, rows)
    is_last = rows + 1 == cu_seqlens[sequence + 1]
    reached = mass.double() >= threshold
    before = exclusive_cumsum(reached)
    open_ = before[:-1] == before[cu_seqlens[sequence].long()]
    return open_, open_ & (reached | is_last)


def halting_units(mass, cu_seqlens, threshold, mode):
    """See `ztok_fast.ops.halting.contract.halting_units`; returns weights, ends, unit, counts and cu_units."""
    dtype = compute_dtype(mass)
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
    return weights, ends, unit.int(), cu_units.diff().int(), cu_units.int()


def halting_units_backward(mass, cu_seqlens, grad_weights, threshold, mode):
    """Gradient of the mass [T] from that of the weights [T, 2].

    In "fire", d own = d mass_t where the row does not fire and -dC_{t-1} where it does, d carried = dC_t, with C the
    prefix sum within the sequence: the gradient of mass_s gathers what later rows of its sequence have.
    """
    if mode == "stop":
        open_, _ = _in_unit(mass, cu_seqlens, threshold)
        return torch.where(open_, grad_weights[:, 0], 0).to(mass.dtype)
    _, _, fired, carries, _ = _accumulate(mass, cu_seqlens, threshold)
    # float64: sequences share one running sum here and must not disturb one another
    grad = grad_weights.double()
    to_exclusive = torch.where(fired, -grad[:, 0], 0)
    to_inclusive = torch.where(carries, grad[:, 1], 0)
    running = torch.cumsum(to_exclusive + to_inclusive, 0)
    running = torch.cat([running.new_zeros(1), running])
    sequence = sequence_of(cu_seqlens, torch.arange(mass.shape[0], device=mass.device))
    later = running[cu_seqlens[sequence + 1].long()] - running[1:]
    direct = torch.where(fired, 0, grad[:, 0])
    return (direct + to_inclusive + later).to(mass.dtype)


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
    """Sums over each unit of weights * values; `values` [T, D] or [T]. Rows of no unit do not count, NaN or not."""
    shape = (-1,) + (1,) * (values.ndim - 1)
    first = segment_sum(values * weights[:, 0].view(shape), own, total_units)
    return first + segment_sum(values * weights[:, 1].view(shape), carried, total_units)


def integrate_units(rows, weights, unit, ends, cu_units, total_units):
    """See `ztok_fast.ops.halting.contract.integrate_units`."""
    dtype = compute_dtype(rows, weights)
    own, carried = unit_indices(unit, ends, cu_units, total_units)
    weights = weights.to(dtype)
    totals = _unit_sums(weights.new_ones(weights.shape[0]), weights, own, carried, total_units)
    sums = _unit_sums(rows.to(dtype), weights, own, carried, total_units)
    means = torch.where(totals[:, None] > 0, sums / totals[:, None], 0)
    return means.to(rows.dtype)


def integrate_units_backward(rows, weights, unit, ends, cu_units, means, grad):
    """Gradients of the rows [T, D] and of the weights [T, 2] from that of the means [K, D]."""
    dtype = compute_dtype(rows, weights)
    total_units = means.shape[0]
    own, carried = unit_indices(unit, ends, cu_units, total_units)
    rows_, weights_ = rows.to(dtype), weights.to(dtype)
    totals = _unit_sums(weights_.new_ones(weights.shape[0]), weights_, own, carried, total_units)[:, None]
    per_weight = torch.where(totals > 0, grad.to(dtype) / totals, 0)
    # a row of zeros at the end for rows that have no such unit
    per_weight = torch.cat([per_weight, per_weight.new_zeros(1, rows.shape[1])])
    means_ = torch.cat([means.to(dtype), means.new_zeros(1, rows.shape[1], dtype=dtype)])
    grad_rows = per_weight[own] * weights_[:, :1] + per_weight[carried] * weights_[:, 1:]
    grad_own = (per_weight[own] * (rows_ - means_[own])).sum(1)
    grad_carried = (per_weight[carried] * (rows_ - means_[carried])).sum(1)
    return grad_rows.to(rows.dtype), torch.stack([grad_own, grad_carried], 1).to(weights.dtype)
