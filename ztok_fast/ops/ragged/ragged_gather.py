"""`ragged_gather`: a packed batch from rows of several tables, several sources per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import ANY_DTYPE, cpp, cuda
from ztok_fast.ops.op import Op
from ztok_fast.ops.ragged import reference
from ztok_fast.ops.ragged.ragged_layout import check_merged, check_sources, interleaved
from ztok_fast.ops.ragged.ragged_scatter_add import check_index_values
from ztok_fast.ops.spec import BACKWARD, Case, CaseTable, Spec, Work, equal, mixed_lengths, offsets, randn


class RaggedBatch(NamedTuple):
    """Several sources packed into one batch.

    Attributes:
        values: [T, D], the rows.
        cu_seqlens: [B + 1], dtype of the first source's.
        position_ids: int64 [T], the distance of a row from the start of its sequence.
    """

    values: Tensor
    cu_seqlens: Tensor
    position_ids: Tensor


def ragged_gather(
    tables: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    cu_seqlens: Sequence[Tensor],
    exact: bool = True,
) -> RaggedBatch:
    """Assemble a packed batch from rows of several tables, several sources per sequence.

    Sequence b of the result is the concatenation over the sources i of
    `tables[i][indices[i][cu_seqlens[i][b]:cu_seqlens[i][b + 1]]]`: for example the Z prefix from the codebooks, a
    separator from the embedding table, then text from the embedding table.

    Args:
        tables: one [R_i, D] per source, all of one dtype (any real or bool) and on one device. A table may be
            given several times.
        indices: for each source int32 or int64 [T_i] with values in [0, R_i), or None for the table's own rows in
            order (T_i = R_i).
        cu_seqlens: for each source int32 or int64 [B + 1] that ends at T_i. A source may have no rows at all.
        exact: False when the T_i are capacities that `cu_seqlens` need not fill; a source's rows (and indices) past
            its last offset are ignored.

    Returns:
        A `RaggedBatch`; T = sum of T_i; rows past the last sequence are zero, at position 0. Differentiable in every
        table: gradients of rows used several times are added in a fixed order, in fp32 at least, so they have the
        same bits every time. O(T (D + log B)), the backward pass O(T (D + log T) + R D).

    Raises:
        ValueError: no source, lists of different lengths, wrong rank, dtype, device or size; under the value checks
            (`ztok_fast.ops.checks`) also `cu_seqlens` that do not add up (with `exact` False: that exceed T_i) and
            indices out of range. Where values are not checked, no such input reads or writes outside of the tensors.
    """
    if not all(isinstance(values, (list, tuple)) for values in (tables, indices, cu_seqlens)):
        _check(tables, indices, cu_seqlens, exact)
    return RaggedBatch(*RAGGED_GATHER(tables, indices, cu_seqlens, exact))


def _check(tables: Any, indices: Any, cu_seqlens: Any, exact: bool) -> None:
    op = "ragged_gather"
    if not isinstance(tables, (list, tuple)) or not tables:
        checks.fail(op, "tables", "a list of at least one tensor [R, D]", checks.describe(tables))
    for argument, values in (("indices", indices), ("cu_seqlens", cu_seqlens)):
        if not isinstance(values, (list, tuple)) or len(values) != len(tables):
            length = len(values) if hasattr(values, "__len__") else "unknown"
            expected = f"a list of {len(tables)} tensors (one per table)"
            checks.fail(op, argument, expected, f"{type(values).__name__} of length {length}")
    given = checks.Arguments(op)
    for i, (table, index) in enumerate(zip(tables, indices)):
        given.tensor(f"tables[{i}]", table, f"[R_{i}, D]", "tables[0]" if i else ANY_DTYPE)
        if index is not None:
            given.tensor(f"indices[{i}]", index, f"[T_{i}]", checks.INDICES)
    check_sources(given, cu_seqlens)


def _check_values(tables: list[Tensor], indices: list[Tensor | None], cu_seqlens: list[Tensor], exact: bool) -> None:
    for i, (table, index, cu) in enumerate(zip(tables, indices, cu_seqlens)):
        rows = table if index is None else index
        checks.check_cu_seqlens_values("ragged_gather", f"cu_seqlens[{i}]", cu, rows.shape[0], exact)
        if index is not None:
            check_index_values("ragged_gather", f"indices[{i}]", index, table.shape[0], None if exact else cu)


def _fake(tables, indices, cu_seqlens, exact):
    main, total = tables[0], sum((t if index is None else index).shape[0] for t, index in zip(tables, indices))
    return (
        main.new_empty(total, main.shape[1]),
        cu_seqlens[0].new_empty(cu_seqlens[0].shape),
        main.new_empty(total, dtype=torch.int64),
    )


def _backward(args, outputs, grads, needs):
    tables, indices, cu_seqlens, _ = args
    needed, table_rows = list(needs[0]), [table.shape[0] for table in tables]
    found = RAGGED_GATHER_BACKWARD(grads[0], indices, cu_seqlens, table_rows, needed)
    return [grad if need else None for grad, need in zip(found, needed)], None, None, None


# --- specification


def make(sizes, dtype, generator):
    """Sources of the given `lengths`, or code vectors, separators and text as a decompressor joins them.

    Given lengths: every second source has an index into a table of 5 rows; `spare`: so many more rows in no sequence,
    with indices that point nowhere. Otherwise `B` sequences of at most `Z` code vectors, a separator and at most `S`
    tokens, from a table of `R` rows and one of an eighth of them.
    """
    if "lengths" in sizes:
        return _small_sources(sizes, dtype, generator)
    B, D, R = sizes["B"], sizes["D"], sizes["R"]
    lengths = [mixed_lengths(B, sizes["Z"], generator), [1] * B, mixed_lengths(B, sizes["S"], generator)]
    embedding, codes = randn(generator, R, D, dtype=dtype), randn(generator, max(2, R // 8), D, dtype=dtype)

    def some(table, n):
        return torch.randint(0, len(table), (sum(n),), generator=generator, device=generator.device)

    separator = torch.zeros(B, dtype=torch.int64, device=generator.device)
    return {
        "tables": [codes, embedding, embedding],
        "indices": [some(codes, lengths[0]), separator, some(embedding, lengths[2])],
        "cu_seqlens": [offsets(n, generator.device) for n in lengths],
    }


def _small_sources(sizes, dtype, generator):
    spare, device, dtypes = sizes.get("spare", 0), generator.device, (torch.int32, torch.int64)
    tables, indices, cu_seqlens = [], [], []
    for i, lengths in enumerate(sizes["lengths"]):
        total = sum(lengths)
        index = torch.randint(0, 5, (total,), generator=generator, device=device)
        index = torch.cat([index, torch.full((spare,), 10**6, device=device)]).to(dtypes[i // 2 % 2])
        tables.append(randn(generator, total + spare if i % 2 else 5, sizes["D"], dtype=dtype))
        indices.append(None if i % 2 else index)
        cu_seqlens.append(offsets(lengths, device, dtypes[i % 2]))
    return {"tables": tables, "indices": indices, "cu_seqlens": cu_seqlens, "exact": not spare}


def check(inputs, result) -> None:
    """Row by row."""
    tables, indices, cu_seqlens = inputs["tables"], inputs["indices"], inputs["cu_seqlens"]
    values = result.values.detach()
    rows = interleaved(cu_seqlens)
    picked = torch.zeros_like(values)
    source, row, _ = torch.tensor(rows, dtype=torch.int64, device=values.device).reshape(-1, 3).unbind(1)
    for i, (table, index) in enumerate(zip(tables, indices)):
        own = (source == i).nonzero()[:, 0]
        picked[own] = table.detach()[row[own] if index is None else index[row[own]].long()]
    equal(values, picked, "values")
    check_merged(cu_seqlens, result.cu_seqlens, result.position_ids, len(values))


def _cases() -> tuple[Case, ...]:
    add = CaseTable("B", "Z", "S", "D", "R")
    # hidden sizes: SmolLM2 576 (with its vocabulary of 49,152), Qwen3 1024, Llama 7B 4096
    add(3, 4, 7, 5, 40, "tiny", both=True)
    add(16, 64, 256, 576, 49_152, "quick")
    add(1, 16, 64, 576, 49_152, "default")
    add(32, 128, 512, 576, 49_152, "default")
    add(16, 128, 512, 1024, 49_152, "default")
    add(16, 64, 256, 576, 4096, "default", direction=BACKWARD)
    add(8, 256, 1024, 4096, 49_152, "full")
    add(64, 256, 1024, 1024, 49_152, "default", both=True, dtype=torch.bfloat16, devices=("cuda",))
    return add.cases()


def _work(case, inputs):
    row, total = case["D"] * case.dtype.itemsize, sum(len(index) for index in inputs["indices"])
    moved = 2.0 * total * row + 16.0 * total
    if case.direction == BACKWARD:
        codes, embedding, _ = inputs["tables"]
        moved += (total + len(codes) + len(embedding)) * row
    return Work(0.0, moved)


RAGGED_GATHER = Op(
    "ragged_gather(Tensor[] tables, Tensor?[] indices, Tensor[] cu_seqlens, bool exact) -> (Tensor, Tensor, Tensor)",
    reference=reference.ragged_gather,
    fake=_fake,
    backends=(cpp(checks_values=True), cuda()),
    backward=_backward,
    linear=True,
    check=_check,
    check_values=_check_values,
    spec=Spec(
        ragged_gather,
        make,
        samples=(
            {"lengths": ((), ()), "D": 2},
            {"lengths": ((1, 0, 2), (0, 2, 1), (3, 3, 0)), "D": 5, "spare": 2},
            {"lengths": ((2, 0, 3), (0, 4, 1)), "D": 3},
            {"lengths": ((1,),), "D": 1},
            {"lengths": ((0, 0), (1, 2)), "D": 16},
            {"lengths": ((3, 2), (1, 0)), "D": 0},
            {"lengths": ((17, 1, 2, 30), (3, 0, 5, 9), (1, 1, 1, 1)), "D": 65},
            {"lengths": tuple((i % 3, (i + 1) % 3, i % 2) for i in range(20)), "D": 8},  # one CUDA launch takes 8
        ),
        check=check,
        differentiable=("tables",),
        outputs=lambda result: (result.values,),
        tolerance=4,
        cases=_cases(),
        work=_work,
    ),
)

RAGGED_GATHER_BACKWARD = Op(
    "ragged_gather_backward(Tensor grad, Tensor?[] indices, Tensor[] cu_seqlens, SymInt[] table_rows, bool[] needed)"
    " -> Tensor[]",
    reference=reference.ragged_gather_backward,
    fake=lambda grad, indices, cu_seqlens, table_rows, needed: [
        grad.new_empty(rows if need else 0, grad.shape[1]) for rows, need in zip(table_rows, needed)
    ],
    backends=(cpp(), cuda()),
)
