"""Halting: which rows of packed sequences end a unit, and the weighted means of units.

Integrate-and-fire with the remainder carried over follows CIF (Dong and Xu, arXiv:1905.11235); a stop threshold on
the mass follows adaptive computation time (Graves, arXiv:1603.08983).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks, dispatch

MODES = ("fire", "stop")


class HaltingUnits(NamedTuple):
    """Units of packed sequences: T rows, B sequences, K units in all.

    Attributes:
        ends: bool [T], rows that end a unit, whether by mass or as the last row of their sequence.
        unit: int32 [T], packed index of the unit that a row belongs to; -1 for rows after the stop in mode "stop".
        weights: float32 [T, 2] (float64 for float64 mass), the row's share in its unit and the remainder that it
            carries into the next unit of the sequence. Differentiable in the mass, once.
        counts: int32 [B], units per sequence.
        cu_units: int32 [B + 1], packed offsets of the sequences' units; the last is K.
    """

    ends: Tensor
    unit: Tensor
    weights: Tensor
    counts: Tensor
    cu_units: Tensor


def halting_units(mass: Tensor, cu_seqlens: Tensor, threshold: float = 1.0, mode: str = "fire") -> HaltingUnits:
    """Divide packed sequences into units by accumulated halting mass.

    Mode "fire": the mass is rounded to multiples of threshold / 2**20, which makes its prefix sums exact and the units
    the same in every backend. Row t ends a unit when the prefix sum C of its sequence passes a multiple of the
    threshold there; what is above the multiple is carried into the next unit. Rows after the last such row form a last,
    part unit. The weights of a complete unit sum to the threshold. Gradient: d weights[t, 0] is d mass[t], and
    -dC[t - 1] where the row fires; d weights[t, 1] is dC[t] where the row fires and a next unit exists, else 0 (the
    remainder of a sequence's last row is dropped). The rounding passes the gradient through.

    Mode "stop": each non-empty sequence is one unit, to the first row whose mass is at least the threshold or the last
    row; rows after it belong to none. weights[t, 0] is the mass as given, weights[t, 1] is 0.

    O(T + B) time on the CPU, O(T log B + B) on a GPU; extra memory O(T). The backward pass likewise.

    Args:
        mass: floating point [T], finite; in [0, threshold] for "fire" (so at most one unit ends per row), at least 0
            for "stop". Where values are not checked, NaN counts as 0 and mass beyond the range as its nearest bound.
        cu_seqlens: int32 or int64 [B + 1], packed offsets of the sequences; empty sequences have no unit.
        threshold: mass of a complete unit, above 0.
        mode: "fire" or "stop".

    Returns:
        `HaltingUnits`.

    Raises:
        ValueError: bad rank, dtype, device, threshold or mode; mass out of range or `cu_seqlens` that do not fit the
            rows (see `ztok_fast.ops.checks` for when values are checked).
    """
    checks.check_tensor("halting_units", "mass", mass, "[T]")
    checks.check_cu_seqlens("halting_units", "cu_seqlens", cu_seqlens, "mass", mass)
    checks.check_positive("halting_units", "threshold", threshold)
    checks.check_choice("halting_units", "mode", mode, MODES)
    weights, ends, unit, counts, cu_units = dispatch.run(
        _registered_halting, _halting_kernel, mass, cu_seqlens, float(threshold), mode
    )
    return HaltingUnits(ends, unit, weights, counts, cu_units)


def check_mass_values(op: str, mass: Tensor, threshold: float, mode: str) -> None:
    """Mass in the range that `halting_units` states for the mode."""
    if not checks.value_checks(mass):
        return
    if mode == "fire":
        # compared in the dtype of the mass, so that its own rounding of the threshold is in range
        upper = torch.tensor(threshold).to(mass.dtype).to(mass.device)
        good, expected = (mass >= 0) & (mass <= upper), f"in [0, {threshold}] (the threshold)"
    else:
        good, expected = (mass >= 0) & torch.isfinite(mass), "finite and at least 0"
    if not bool(good.all()):
        row = int(good.int().argmin())
        checks.fail(op, "mass", expected, f"{float(mass[row])} in row {row}")


def _halting_kernel(
    mass: Tensor, cu_seqlens: Tensor, threshold: float, mode: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def check() -> None:
        checks.check_cu_seqlens_values("halting_units", "cu_seqlens", cu_seqlens, mass.shape[0])
        check_mass_values("halting_units", mass, threshold, mode)

    return dispatch.call_contiguous("halting_units", mass, cu_seqlens, threshold, mode, check=check)


_halting_units = torch.library.custom_op("ztok::halting_units", _halting_kernel, mutates_args=())
_registered_halting = torch.ops.ztok.halting_units.default


def fake_units(mass: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors with the shapes and dtypes of weights, ends, unit, counts and cu_units."""
    rows, offsets = mass.shape[0], cu_seqlens.shape[0]
    return (
        mass.new_empty((rows, 2), dtype=checks.compute_dtype(mass)),
        mass.new_empty(rows, dtype=torch.bool),
        mass.new_empty(rows, dtype=torch.int32),
        mass.new_empty(offsets - 1, dtype=torch.int32),
        mass.new_empty(offsets, dtype=torch.int32),
    )


@_halting_units.register_fake
def _(mass, cu_seqlens, threshold, mode):
    return fake_units(mass, cu_seqlens)


@torch.library.custom_op("ztok::halting_units_backward", mutates_args=())
def _halting_units_backward(
    mass: Tensor, cu_seqlens: Tensor, grad_weights: Tensor, threshold: float, mode: str
) -> Tensor:
    """Gradient of the mass [T] from that of the weights [T, 2]."""
    return dispatch.call_contiguous("halting_units_backward", mass, cu_seqlens, grad_weights, threshold, mode)


@_halting_units_backward.register_fake
def _(mass, cu_seqlens, grad_weights, threshold, mode):
    return mass.new_empty(mass.shape)


def _save_halting(ctx, inputs, output):
    mass, cu_seqlens, ctx.threshold, ctx.mode = inputs
    ctx.save_for_backward(mass, cu_seqlens)


def _halting_backward(ctx, grad_weights, grad_ends, grad_unit, grad_counts, grad_cu_units):
    return _halting_units_backward(*ctx.saved_tensors, grad_weights, ctx.threshold, ctx.mode), None, None, None


_halting_units.register_autograd(_halting_backward, setup_context=_save_halting)


def integrate_units(rows: Tensor, units: HaltingUnits, total_units: int) -> Tensor:
    """The weighted mean of each unit's rows, a row that carries counting in both of its units.

    O(T D) time, the backward pass too; extra memory O(T).

    Args:
        rows: floating point [T, D].
        units: the units of those T rows, from `halting_units`.
        total_units: rows of the result. At least the number of units K (`units.cu_units[-1]`); the caller says it, so
            that the shape depends on no data. Rows past the last unit are 0. Where values are not checked, units past
            `total_units` are dropped.

    Returns:
        [total_units, D] in the dtype of `rows`, accumulated in float32 (float64 if anything is float64). A unit whose
        weights are all 0 gives 0 and passes no gradient. Differentiable in `rows` and `units.weights`, once.

    Raises:
        ValueError: bad rank, dtype, device; units of another number of rows; fewer `total_units` than units.
    """
    checks.check_tensor("integrate_units", "rows", rows, "[T, D]")
    check_units("integrate_units", units, rows)
    checks.check_count("integrate_units", "total_units", total_units)
    return dispatch.run(
        _registered_integrate,
        _integrate_kernel,
        rows,
        units.weights,
        units.unit,
        units.ends,
        units.cu_units,
        total_units,
    )


def check_units(op: str, units: object, rows: Tensor) -> None:
    """`HaltingUnits` of as many rows as `rows` has, on the same device."""
    if not isinstance(units, HaltingUnits):
        checks.fail(op, "units", "HaltingUnits", type(units).__name__)
    integers = checks.INDICES
    layouts = {
        "ends": ("[T]", (torch.bool,)),
        "unit": ("[T]", integers),
        "weights": ("[T, 2]", (torch.float32, torch.float64)),
        "cu_units": ("[B + 1]", integers),
    }
    for field, (layout, dtypes) in layouts.items():
        value = getattr(units, field)
        checks.check_tensor(op, f"units.{field}", value, layout, dtypes)
        checks.check_same_device(op, f"units.{field}", value, "rows", rows)
        if field != "cu_units":
            checks.check_size(op, f"units.{field}", value, 0, rows.shape[0], "rows")
    checks.check_size(op, "units.weights", units.weights, 1, 2, "own and carried share")


def _integrate_kernel(
    rows: Tensor, weights: Tensor, unit: Tensor, ends: Tensor, cu_units: Tensor, total_units: int
) -> Tensor:
    check_total_units("integrate_units", cu_units, total_units)
    return dispatch.call_contiguous("integrate_units", rows, weights, unit, ends, cu_units, total_units)


_integrate_units = torch.library.custom_op("ztok::integrate_units", _integrate_kernel, mutates_args=())
_registered_integrate = torch.ops.ztok.integrate_units.default


def check_total_units(op: str, cu_units: Tensor, total_units: int) -> None:
    """No fewer result rows than units."""
    if checks.value_checks(cu_units) and int(cu_units[-1]) > total_units:
        checks.fail(op, "total_units", f"at least {int(cu_units[-1])} (the number of units)", total_units)


@_integrate_units.register_fake
def _(rows, weights, unit, ends, cu_units, total_units):
    return rows.new_empty((total_units, rows.shape[1]))


@torch.library.custom_op("ztok::integrate_units_backward", mutates_args=())
def _integrate_units_backward(
    rows: Tensor, weights: Tensor, unit: Tensor, ends: Tensor, cu_units: Tensor, means: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows [T, D] and of the weights [T, 2] from that of the means [K, D]."""
    return dispatch.call_contiguous("integrate_units_backward", rows, weights, unit, ends, cu_units, means, grad)


@_integrate_units_backward.register_fake
def _(rows, weights, unit, ends, cu_units, means, grad):
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _save_integrate(ctx, inputs, output):
    rows, weights, unit, ends, cu_units, _ = inputs
    ctx.save_for_backward(rows, weights, unit, ends, cu_units, output)


def _integrate_backward(ctx, grad):
    return *_integrate_units_backward(*ctx.saved_tensors, grad), None, None, None, None


_integrate_units.register_autograd(_integrate_backward, setup_context=_save_integrate)
