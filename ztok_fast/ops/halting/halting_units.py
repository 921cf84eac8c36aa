"""`halting_units`: which rows of packed sequences end a unit.

Integrate-and-fire with the remainder carried over follows CIF (Dong and Xu, arXiv:1905.11235); a stop threshold on
the mass follows adaptive computation time (Graves, arXiv:1603.08983).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import FLOATS, cpp, triton
from ztok_fast.ops.halting import reference
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import BACKWARD, Case, CaseTable, Spec, Work, close, equal, lengths_of, offsets

MODES = ("fire", "stop")


class HaltingUnits(NamedTuple):
    """Units of packed sequences: T rows, B sequences, K units in all.

    Attributes:
        ends: bool [T], rows that end a unit, whether by mass or as the last row of their sequence.
        unit: int32 [T], packed index of the unit that a row belongs to; -1 for rows after the stop in mode "stop".
        weights: float32 [T, 2] (float64 for float64 mass), the row's share in its unit and the remainder that it
            carries into the next unit of the sequence. Differentiable in the mass.
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
    given = checks.Arguments("halting_units")
    given.tensor("mass", mass, "[T]")
    given.tensor("cu_seqlens", cu_seqlens, "[B + 1]", checks.INDICES)
    checks.check_positive("halting_units", "threshold", threshold)
    checks.check_choice("halting_units", "mode", mode, MODES)
    weights, ends, unit, counts, cu_units = HALTING_UNITS(mass, cu_seqlens, float(threshold), mode)
    return HaltingUnits(ends, unit, weights, counts, cu_units)


def _check_values(mass: Tensor, cu_seqlens: Tensor, threshold: float, mode: str) -> None:
    checks.check_cu_seqlens_values("halting_units", "cu_seqlens", cu_seqlens, mass.shape[0])
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
        checks.fail("halting_units", "mass", expected, f"{float(mass[row])} in row {row}")


def _fake(mass, cu_seqlens, threshold, mode):
    rows, offsets = mass.shape[0], cu_seqlens.shape[0]
    return (
        mass.new_empty((rows, 2), dtype=checks.compute_dtype(mass)),
        mass.new_empty(rows, dtype=torch.bool),
        mass.new_empty(rows, dtype=torch.int32),
        mass.new_empty(offsets - 1, dtype=torch.int32),
        mass.new_empty(offsets, dtype=torch.int32),
    )


def _backward(args, outputs, grads, needs):
    mass, cu_seqlens, threshold, mode = args
    return HALTING_UNITS_BACKWARD(mass, cu_seqlens, grads[0], threshold, mode), None, None, None


# --- specification


def some_mass(rows, dtype, generator, sizes) -> Tensor:
    """Mass of about a quarter per row, so that a unit has four rows; multiples of 2⁻¹⁴, or of 2⁻⁷ in half precision,
    off the multiples of the threshold. `mass`: one value instead. In [0, threshold]."""
    threshold = sizes.get("threshold", 1.0)
    if "mass" in sizes:
        return torch.full((rows,), sizes["mass"] * threshold, dtype=dtype, device=generator.device)
    draws = torch.rand(rows, generator=generator, device=generator.device)
    steps = 2**14 if dtype.itemsize > 2 else 2**7
    return (((draws * 0.5 * steps).round() / steps) * threshold).to(dtype)


def make(sizes, dtype, generator):
    """Mass of `B` sequences of at most `S` rows, or of sequences of `lengths`; `threshold` and `mode` as they are."""
    lengths = lengths_of(sizes, generator)
    return {
        "mass": some_mass(sum(lengths), dtype, generator, sizes),
        "cu_seqlens": offsets(lengths, generator.device, sizes.get("offsets", torch.int32)),
        "threshold": sizes.get("threshold", 1.0),
        "mode": sizes.get("mode", "fire"),
    }


def check(inputs, result) -> None:
    """Units and weights against the reference in float64."""
    mass = inputs["mass"].detach()
    check_units_found(result, mass, inputs["cu_seqlens"], inputs["threshold"], inputs["mode"])


def check_units_found(units, mass, cu_seqlens, threshold, mode) -> None:
    """`HaltingUnits` of a mass: integers to the bit, weights to their own rounding."""
    weights, *expected = reference.halting_units(mass.double(), cu_seqlens, threshold, mode)
    for name, wanted in zip(("ends", "unit", "counts", "cu_units"), expected):
        equal(getattr(units, name), wanted, f"units.{name}")
    close(units.weights.detach(), weights, checks.compute_dtype(mass), what="units.weights")


def _cases() -> tuple[Case, ...]:
    add = CaseTable("B", "S")
    add(3, 20, "tiny", both=True)
    add(16, 512, "quick")
    for B, S in ((1, 64), (1, 65536), (16, 512), (256, 512)):
        add(B, S, "default")
    add(16, 512, "default", direction=BACKWARD)
    add(256, 512, "default", direction=BACKWARD)
    add(1024, 4096, "default", both=True, devices=("cuda",))
    add(1024, 4096, "full")
    return add.cases()


def _work(case, inputs):
    rows = inputs["mass"].shape[0]
    moved = rows * (4 + 8 + 1 + 4) + 4 * case["B"] * 3
    return Work(0.0, moved + (rows * 16 if case.direction == BACKWARD else 0))


HALTING_UNITS = Op(
    "halting_units(Tensor mass, Tensor cu_seqlens, float threshold, str mode)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.halting_units,
    fake=_fake,
    backends=(cpp(checks_values=True), triton("halting.triton:halting_units", FLOATS)),
    backward=_backward,
    check_values=_check_values,
    spec=Spec(
        halting_units,
        make,
        samples=(
            {"lengths": (7, 0, 1, 16), "offsets": torch.int64},
            {"lengths": (5, 9, 2)},
            {"lengths": (5, 9, 0, 2), "mode": "stop", "threshold": 0.25},
            {"lengths": (), "mode": "fire"},
            {"lengths": (0, 0, 0), "mode": "stop"},
            {"lengths": (33, 0, 70), "mass": 1.0},
            {"lengths": (5, 40), "mass": 0.0, "threshold": 7.5},
            {"lengths": (300, 1, 2), "threshold": 0.3},
        ),
        check=check,
        differentiable=("mass",),
        outputs=lambda result: (result.weights,),
        cases=_cases(),
        work=_work,
    ),
)

HALTING_UNITS_BACKWARD = Op(
    "halting_units_backward(Tensor mass, Tensor cu_seqlens, Tensor grad_weights, float threshold, str mode) -> Tensor",
    reference=reference.halting_units_backward,
    fake=lambda mass, *_: mass.new_empty(mass.shape),
    backends=(cpp(), triton("halting.triton:halting_units_backward", FLOATS)),
)
