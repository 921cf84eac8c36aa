"""`integrate_units`: the weighted mean of the rows of each unit.

After the integration of CIF (Dong and Xu, arXiv:1905.11235).
"""

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import FLOATS, cpp, triton
from ztok_fast.ops.halting import reference
from ztok_fast.ops.halting.halting_units import HaltingUnits, some_mass
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import BACKWARD, Case, CaseTable, Spec, Work, lengths_of, offsets, randn

_LAYOUTS = {
    "ends": ("[T]", (torch.bool,)),
    "unit": ("[T]", checks.INDICES),
    "weights": ("[T, 2]", (torch.float32, torch.float64)),
    "cu_units": ("[B + 1]", checks.INDICES),
}


def integrate_units(rows: Tensor, units: HaltingUnits, total_units: int) -> Tensor:
    """The weighted mean of the rows of each unit. A row that carries a remainder into the next unit counts in both.

    O(T D) time, the backward pass too; extra memory O(T).

    Args:
        rows: floating point [T, D].
        units: the units of those T rows, from `halting_units`.
        total_units: number of rows of the result, at least the number of units K (`units.cu_units[-1]`). The caller
            gives it, so that the shape does not depend on data. Rows past the last unit are 0. Where values are not
            checked, units past `total_units` are dropped.

    Returns:
        [total_units, D] in the dtype of `rows`, accumulated in float32 (float64 if anything is float64). A unit whose
        weights are all 0 gives 0 and passes no gradient. Differentiable in `rows` and `units.weights`.

    Raises:
        ValueError: bad rank, dtype, device; units of another number of rows; fewer `total_units` than units.
    """
    given = checks.Arguments("integrate_units")
    given.tensor("rows", rows, "[T, D]")
    check_units(given, units)
    checks.check_count("integrate_units", "total_units", total_units)
    return INTEGRATE_UNITS(rows, units.weights, units.unit, units.ends, units.cu_units, total_units)


def check_units(given: checks.Arguments, units: object) -> None:
    """`HaltingUnits` of as many rows T as an argument that is `given` has."""
    if not isinstance(units, HaltingUnits):
        checks.fail(given.op, "units", "HaltingUnits", type(units).__name__)
    for field, (layout, dtypes) in _LAYOUTS.items():
        given.tensor(f"units.{field}", getattr(units, field), layout, dtypes)


def check_unit_values(op: str, cu_units: Tensor, total_units: int) -> None:
    """Offsets of units that begin at 0 and do not decrease; no fewer result rows than units."""
    if not checks.value_checks(cu_units):
        return
    if int(cu_units[-1]) > total_units:
        checks.fail(op, "total_units", f"at least {int(cu_units[-1])} (the number of units)", total_units)
    checks.check_cu_seqlens_values(op, "units.cu_units", cu_units, total_units, exact=False)


def _check_values(rows, weights, unit, ends, cu_units, total_units) -> None:
    check_unit_values("integrate_units", cu_units, total_units)


def _backward(args, outputs, grads, needs):
    return *INTEGRATE_UNITS_BACKWARD(*args[:5], outputs[0], grads[0]), None, None, None, None


# --- specification


def make(sizes, dtype, generator):
    """Rows of width `D` with the units of random mass; see `halting_units.make`. `spare`: rows past the last unit."""
    lengths = lengths_of(sizes, generator)
    mass = some_mass(sum(lengths), torch.promote_types(dtype, torch.float32), generator, sizes)
    found = reference.halting_units(mass, offsets(lengths, generator.device), 1.0, sizes.get("mode", "fire"))
    weights, ends, unit, _, cu_units = found
    index = sizes.get("index", torch.int32)
    return {
        "rows": randn(generator, sum(lengths), sizes["D"], dtype=dtype),
        "weights": weights,
        "unit": unit.to(index),
        "ends": ends,
        "cu_units": cu_units.to(index),
        "total_units": int(cu_units[-1]) + sizes.get("spare", 0),
    }


def _from_parts(rows, weights, unit, ends, cu_units, total_units):
    return integrate_units(rows, HaltingUnits(ends, unit, weights, cu_units.diff(), cu_units), total_units)


def _cases() -> tuple[Case, ...]:
    add = CaseTable("B", "S", "D")
    add(3, 9, 8, "tiny", both=True)
    add(16, 256, 576, "default", both=True)
    add(64, 1024, 1024, "default", both=True, dtype=torch.bfloat16, devices=("cuda",))
    return add.cases()


def _work(case, inputs):
    (T, D), K, size = inputs["rows"].shape, inputs["total_units"], case.dtype.itemsize
    least = Work(2.0 * T * D, (T + K) * D * size + 13 * T)
    if case.direction == BACKWARD:
        return Work(least.flops + 4.0 * T * D, least.bytes + (2 * T + 2 * K) * D * size + 21 * T)
    return least


INTEGRATE_UNITS = Op(
    "integrate_units(Tensor rows, Tensor weights, Tensor unit, Tensor ends, Tensor cu_units, SymInt total_units)"
    " -> Tensor",
    reference=reference.integrate_units,
    fake=lambda rows, weights, unit, ends, cu_units, total_units: rows.new_empty((total_units, rows.shape[1])),
    backends=(cpp(checks_values=True), triton("halting.triton:integrate_units", FLOATS)),
    backward=_backward,
    check_values=_check_values,
    spec=Spec(
        _from_parts,
        make,
        samples=(
            {"lengths": (7, 0, 1, 6), "D": 3, "spare": 2},
            {"lengths": (5, 9, 2), "D": 5, "index": torch.int64},
            {"lengths": (5, 9, 0, 2), "D": 1, "mode": "stop"},
            {"lengths": (), "D": 4, "spare": 3},
            {"lengths": (3, 0, 5), "D": 31, "mass": 0.0},
            {"lengths": (9, 0, 1, 40), "D": 67, "mass": 1.0},
            {"lengths": (9, 40, 2), "D": 200},
        ),
        differentiable=("rows", "weights"),
        tolerance=4,
        cases=_cases(),
        work=_work,
        flops_of_reference=4.0,
    ),
)

INTEGRATE_UNITS_BACKWARD = Op(
    "integrate_units_backward(Tensor rows, Tensor weights, Tensor unit, Tensor ends, Tensor cu_units, Tensor means,"
    " Tensor grad) -> (Tensor, Tensor)",
    reference=reference.integrate_units_backward,
    fake=lambda rows, weights, *_: (rows.new_empty(rows.shape), weights.new_empty(weights.shape)),
    backends=(cpp(), triton("halting.triton:integrate_units_backward", FLOATS)),
)
