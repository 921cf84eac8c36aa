"""`ragged_scatter_add`: rows added into a table by index, in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import cpp, cuda
from ztok_fast.ops.op import Op
from ztok_fast.ops.ragged import reference
from ztok_fast.ops.spec import Spec, close, randn


def ragged_scatter_add(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Sum rows into a table of zeros by index, in a fixed order: the transpose of `table[index]`.

    Args:
        rows: [T, D], float16, bfloat16, float32 or float64.
        index: int32 or int64 [T] with values in [0, num_rows).
        num_rows: number of rows R of the result.

    Returns:
        [R, D], dtype of `rows`, summed in fp32 (float64 for float64); the same bits every time. Differentiable in
        `rows`. O(T (D + log T) + R D).

    Raises:
        ValueError: wrong rank, dtype, device or size; under the value checks also an index out of range. Where values
            are not checked such rows are left out.
    """
    given = checks.Arguments("ragged_scatter_add")
    given.tensor("rows", rows, "[T, D]")
    given.tensor("index", index, "[T]", checks.INDICES)
    checks.check_count(given.op, "num_rows", num_rows)
    return RAGGED_SCATTER_ADD(rows, index, num_rows)


def check_index_values(op: str, argument: str, index: Tensor, num_rows: int, cu_seqlens: Tensor | None = None) -> None:
    """All in [0, num_rows), or of those that `cu_seqlens` cover."""
    if cu_seqlens is not None and checks.value_checks(index):
        index = index[: int(cu_seqlens[-1])]
    checks.check_range_values(op, argument, index, 0, num_rows - 1, f"in [0, {num_rows}) (rows of the table)")


def _check_values(rows: Tensor, index: Tensor, num_rows: int) -> None:
    check_index_values("ragged_scatter_add", "index", index, num_rows)


def _backward(args, outputs, grads, needs):
    return grads[0].index_select(0, args[1]), None, None


# --- specification


def make(sizes, dtype, generator):
    """`T` rows of width `D` and indices of `R` rows."""
    T, R, D = (sizes[name] for name in ("T", "R", "D"))
    index = torch.randint(0, max(R, 1), (T,), generator=generator, device=generator.device)
    return {
        "rows": randn(generator, T, D, dtype=dtype),
        "index": index.to(sizes.get("index", torch.int64)),
        "num_rows": R,
    }


def check(inputs, result) -> None:
    """Sums against float64."""
    rows, index = inputs["rows"].detach(), inputs["index"]
    sums = torch.zeros(inputs["num_rows"], rows.shape[1], dtype=torch.float64, device=rows.device)
    close(result.detach(), sums.index_add(0, index, rows.double()), rows.dtype, 4, "sums")


RAGGED_SCATTER_ADD = Op(
    "ragged_scatter_add(Tensor rows, Tensor index, SymInt num_rows) -> Tensor",
    reference=reference.ragged_scatter_add,
    fake=lambda rows, index, num_rows: rows.new_empty(num_rows, rows.shape[1]),
    backends=(cpp(checks_values=True), cuda()),
    backward=_backward,
    linear=True,
    check_values=_check_values,
    spec=Spec(
        ragged_scatter_add,
        make,
        samples=(
            {"T": 5, "R": 4, "D": 3},
            {"T": 33, "R": 7, "D": 17, "index": torch.int32},
            {"T": 1, "R": 1, "D": 1},
            {"T": 0, "R": 3, "D": 2},
            {"T": 0, "R": 0, "D": 2},
            {"T": 4, "R": 2, "D": 0},
            {"T": 300, "R": 1, "D": 65},
            {"T": 300, "R": 4000, "D": 8},
        ),
        check=check,
        differentiable=("rows",),
        tolerance=4,
    ),
)
