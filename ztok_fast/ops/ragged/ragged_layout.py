"""`ragged_layout`: where the rows of several sources go in one packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import cpp, cuda
from ztok_fast.ops.op import Op
from ztok_fast.ops.ragged import reference
from ztok_fast.ops.spec import Spec, equal, offsets


class RaggedLayout(NamedTuple):
    """Where the rows of several sources go in one packed batch.

    Attributes:
        cu_seqlens: [B + 1], dtype of the first source's.
        position_ids: int64 [T], the distance of a row from the start of its sequence.
        destinations: one int64 [T_i] per source, the output row of each of its rows.
    """

    cu_seqlens: Tensor
    position_ids: Tensor
    destinations: tuple[Tensor, ...]

    def place(self, parts: Sequence[Tensor]) -> Tensor:
        """Pack one tensor [T_i, *] per source into [T, *], differentiably; the way to place labels or position ids."""
        rows = torch.cat(list(parts))
        return torch.empty_like(rows).index_copy(0, torch.cat(self.destinations), rows)


def ragged_layout(cu_seqlens: Sequence[Tensor], totals: Sequence[int], exact: bool = True) -> RaggedLayout:
    """Lay out a batch whose sequence b is source 0's sequence b, then source 1's, and so on.

    Use it to place anything else the way `ragged_gather` places its rows, or to find a source's rows again. O(T + B)
    for a few sources, on a GPU O(T log B).

    Args:
        cu_seqlens: one int32 or int64 [B + 1] per source.
        totals: number of rows T_i of each source, known to the caller.
        exact: False when the totals are capacities that `cu_seqlens` need not fill.

    Returns:
        A `RaggedLayout`; T = sum of T_i. Rows past the last sequence have position 0; a source's rows that are in no
        sequence go there, source by source, so that all destinations together are a permutation of [0, T).

    Raises:
        ValueError: no source, wrong rank, dtype, device or size; under the value checks also `cu_seqlens` that do
            not add up to their total (with `exact` False: that exceed it). Where values are not checked destinations
            stay in [0, T).
    """
    op = "ragged_layout"
    check_sources(checks.Arguments(op), cu_seqlens)
    if not isinstance(totals, (list, tuple)) or len(totals) != len(cu_seqlens):
        checks.fail(op, "totals", f"a list of {len(cu_seqlens)} integers (one per source)", checks.describe(totals))
    for i, total in enumerate(totals):
        checks.check_count(op, f"totals[{i}]", total)
    cu_seqlens, totals = list(cu_seqlens), list(totals)
    merged, position_ids, destination = RAGGED_LAYOUT(cu_seqlens, totals, exact)
    return RaggedLayout(merged, position_ids, destination.split_with_sizes(totals))


def check_sources(given: checks.Arguments, cu_seqlens: object) -> None:
    """A list of at least one `cu_seqlens`, all of one length."""
    if not isinstance(cu_seqlens, (list, tuple)) or not cu_seqlens:
        checks.fail(given.op, "cu_seqlens", "a list of at least one tensor [B + 1]", checks.describe(cu_seqlens))
    for i, cu in enumerate(cu_seqlens):
        given.tensor(f"cu_seqlens[{i}]", cu, "[B + 1]", checks.INDICES)


def _check_values(cu_seqlens: list[Tensor], totals: list[int], exact: bool) -> None:
    for i, (cu, total) in enumerate(zip(cu_seqlens, totals)):
        checks.check_cu_seqlens_values("ragged_layout", f"cu_seqlens[{i}]", cu, total, exact)


def _fake(cu_seqlens, totals, exact):
    first, total = cu_seqlens[0], sum(totals)
    rows = [first.new_empty(total, dtype=torch.int64) for _ in range(2)]
    return first.new_empty(first.shape), *rows


# --- specification


def make(sizes, dtype, generator):
    """Sources with sequences of the given `lengths`; `spare`: room for so many more rows in each."""
    spare = sizes.get("spare", 0)
    dtypes = (torch.int32, torch.int64)
    return {
        "cu_seqlens": [offsets(n, generator.device, dtypes[i % 2]) for i, n in enumerate(sizes["lengths"])],
        "totals": [sum(n) + spare for n in sizes["lengths"]],
        "exact": not spare,
    }


def interleaved(cu_seqlens: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """(source, row of the source, position) of every row of the packed batch, found one at a time."""
    starts = [cu.tolist() for cu in cu_seqlens]
    found = []
    for b in range(len(starts[0]) - 1):
        rows = [(i, row) for i, start in enumerate(starts) for row in range(start[b], start[b + 1])]
        found += [(i, row, position) for position, (i, row) in enumerate(rows)]
    return found


def check_merged(cu_seqlens: Sequence[Tensor], merged: Tensor, position_ids: Tensor, total: int) -> None:
    """Offsets and position ids of a batch with room for `total` rows."""
    rows = interleaved(cu_seqlens)
    equal(merged, torch.stack([cu.long() for cu in cu_seqlens]).sum(0).to(cu_seqlens[0].dtype), "cu_seqlens")
    positions = [position for _, _, position in rows] + [0] * (total - len(rows))
    equal(position_ids, torch.tensor(positions, dtype=torch.int64, device=merged.device), "position_ids")


def check(inputs, result) -> None:
    """Row by row."""
    cu_seqlens, totals = inputs["cu_seqlens"], inputs["totals"]
    check_merged(cu_seqlens, result.cu_seqlens, result.position_ids, sum(totals))
    order = [(i, row) for i, row, _ in interleaved(cu_seqlens)]
    order += [(i, row) for i, cu in enumerate(cu_seqlens) for row in range(int(cu[-1]), totals[i])]
    for i, found in enumerate(result.destinations):
        wanted = sorted((row, out) for out, (source, row) in enumerate(order) if source == i)
        rows = torch.tensor([out for _, out in wanted], dtype=torch.int64, device=found.device)
        equal(found, rows, f"destinations[{i}]")


RAGGED_LAYOUT = Op(
    "ragged_layout(Tensor[] cu_seqlens, SymInt[] totals, bool exact) -> (Tensor, Tensor, Tensor)",
    reference=reference.ragged_layout,
    fake=_fake,
    backends=(cpp(checks_values=True), cuda()),
    check_values=_check_values,
    spec=Spec(
        ragged_layout,
        make,
        samples=(
            {"lengths": ((), ())},
            {"lengths": ((1, 0, 2), (0, 2, 1), (3, 3, 0)), "spare": 2},
            {"lengths": ((2, 0, 3), (0, 4, 1))},
            {"lengths": ((1,),)},
            {"lengths": ((0, 0),)},
            {"lengths": tuple((i % 3, (i + 1) % 3, i % 2) for i in range(20)), "spare": 1},  # one CUDA launch takes 8
        ),
        check=check,
        outputs=lambda result: (result.cu_seqlens, result.position_ids, *result.destinations),
        dtypes=(torch.float32,),  # it has no floating-point tensor
    ),
)
