"""Public functions `ragged_gather`, `ragged_layout` and `ragged_scatter_add`: checks, registration, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks, dispatch
from ztok_fast.ops.requirements import ANY_DTYPE, FLOATS


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


def _length(value: object) -> object:
    return len(value) if hasattr(value, "__len__") else "unknown"


def _check_index_values(op: str, argument: str, index: Tensor, num_rows: int, cu_seqlens: Tensor | None = None) -> None:
    """All in [0, num_rows), or of those that `cu_seqlens` cover."""
    if not checks.value_checks(index):
        return
    if cu_seqlens is not None:
        index = index[: int(cu_seqlens[-1])]
    if index.numel() == 0:
        return
    if index.numel() <= 64:  # a list of Python integers is cheaper than three tensor ops
        values = index.tolist()
        low, high = min(values), max(values)
    else:
        low, high = (int(value) for value in index.aminmax())
    if low < 0 or high >= num_rows:
        checks.fail(op, argument, f"in [0, {num_rows}) (rows of the table)", f"{low if low < 0 else high}")


def _layout_kernel(cu_seqlens: list[Tensor], totals: list[int], exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    def check() -> None:
        for i, (cu, total) in enumerate(zip(cu_seqlens, totals)):
            checks.check_cu_seqlens_values("ragged_layout", f"cu_seqlens[{i}]", cu, total, exact)

    row = dispatch.choose("ragged_layout", cu_seqlens[0].device, cu_seqlens[0].dtype)
    layout = dispatch.run_row(row, check, cu_seqlens, totals)
    checks.check_covered(check, layout[0], sum(totals), exact)
    return layout


_ragged_layout = torch.library.custom_op("ztok::ragged_layout", _layout_kernel, mutates_args=())


@_ragged_layout.register_fake
def _(cu_seqlens, totals, exact):
    first, total = cu_seqlens[0], sum(totals)
    return (
        torch.empty_like(first),
        first.new_empty(total, dtype=torch.int64),
        first.new_empty(total, dtype=torch.int64),
    )


_registered_layout = torch.ops.ztok.ragged_layout.default


def _check_sources(op: str, cu_seqlens: object, main_argument: str, main: Tensor | None) -> None:
    if not isinstance(cu_seqlens, (list, tuple)) or not cu_seqlens:
        checks.fail(op, "cu_seqlens", "a list of at least one tensor [B + 1]", checks.describe(cu_seqlens))
    for i, cu in enumerate(cu_seqlens):
        argument = f"cu_seqlens[{i}]"
        checks.check_cu_seqlens(op, argument, cu, main_argument, main if main is not None else cu_seqlens[0])
        checks.check_size(op, argument, cu, 0, cu_seqlens[0].shape[0], "as cu_seqlens[0]")


def ragged_layout(cu_seqlens: Sequence[Tensor], totals: Sequence[int], exact: bool = True) -> RaggedLayout:
    """Lay out a batch whose sequence b is source 0's sequence b, then source 1's, and so on.

    Use it to place anything else the way `ragged_gather` places its rows, or to find a source's rows again. O(T + B) for
    a few sources, on a GPU O(T log B).

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
    _check_sources(op, cu_seqlens, "cu_seqlens[0]", None)
    if not isinstance(totals, (list, tuple)) or len(totals) != len(cu_seqlens):
        checks.fail(op, "totals", f"a list of {len(cu_seqlens)} integers (one per source)", checks.describe(totals))
    for i, total in enumerate(totals):
        checks.check_count(op, f"totals[{i}]", total)
    merged, position_ids, destination = dispatch.run(
        _registered_layout, _layout_kernel, list(cu_seqlens), list(totals), exact
    )
    return RaggedLayout(merged, position_ids, destination.split(list(totals)))


def _gather_kernel(
    tables: list[Tensor], indices: list[Tensor | None], cu_seqlens: list[Tensor], exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    def check() -> None:
        for i, (table, index, cu) in enumerate(zip(tables, indices, cu_seqlens)):
            rows = table if index is None else index
            checks.check_cu_seqlens_values("ragged_gather", f"cu_seqlens[{i}]", cu, rows.shape[0], exact)
            if index is not None:
                _check_index_values("ragged_gather", f"indices[{i}]", index, table.shape[0], None if exact else cu)

    main = tables[0]
    row = dispatch.choose("ragged_gather", main.device, main.dtype, main.shape[-1])
    gathered = dispatch.run_row(row, check, tables, indices, cu_seqlens)
    checks.check_covered(check, gathered[1], gathered[0].shape[0], exact)  # merged offsets are sums of the sources'
    return gathered


_ragged_gather = torch.library.custom_op("ztok::ragged_gather", _gather_kernel, mutates_args=())


def _source_totals(tables: Sequence[Tensor], indices: Sequence[Tensor | None]) -> list[int]:
    return [(table if index is None else index).shape[0] for table, index in zip(tables, indices)]


@_ragged_gather.register_fake
def _(tables, indices, cu_seqlens, exact):
    main, total = tables[0], sum(_source_totals(tables, indices))
    return (
        main.new_empty(total, main.shape[1]),
        torch.empty_like(cu_seqlens[0]),
        main.new_empty(total, dtype=torch.int64),
    )


def _like_indices(indices: Sequence[Tensor | None]) -> list[None] | None:
    """The gradient of a list of indices: PyTorch wants a list only where every entry was a tensor."""
    return [None] * len(indices) if all(index is not None for index in indices) else None


def _gather_context(ctx, inputs, output):
    tables, indices, cu_seqlens, exact = inputs
    ctx.table_rows = [table.shape[0] for table in tables]
    ctx.indexed = [index is not None for index in indices]
    ctx.exact = exact
    ctx.save_for_backward(*cu_seqlens, *(index for index in indices if index is not None))


def _saved_sources(ctx) -> tuple[list[Tensor], list[Tensor | None]]:
    num_sources = len(ctx.indexed)
    given = iter(ctx.saved_tensors[num_sources:])
    return list(ctx.saved_tensors[:num_sources]), [next(given) if indexed else None for indexed in ctx.indexed]


def _gather_backward(ctx, grad, _grad_cu_seqlens, _grad_position_ids):
    cu_seqlens, indices = _saved_sources(ctx)
    needed = list(ctx.needs_input_grad[0])
    grads = _ragged_gather_backward(grad, indices, cu_seqlens, ctx.table_rows, needed, ctx.exact)
    table_grads = [table_grad if need else None for table_grad, need in zip(grads, needed)]
    return table_grads, _like_indices(indices), [None] * len(cu_seqlens), None


_ragged_gather.register_autograd(_gather_backward, setup_context=_gather_context)
_registered_gather = torch.ops.ztok.ragged_gather.default


@torch.library.custom_op("ztok::ragged_gather_backward", mutates_args=())
def _ragged_gather_backward(
    grad: Tensor,
    indices: Sequence[Tensor | None],
    cu_seqlens: Sequence[Tensor],
    table_rows: Sequence[int],
    needed: Sequence[bool],
    exact: bool,
) -> list[Tensor]:
    """The gradient of every table, [0, D] for those not needed. `exact` is for the gather that is its own backward."""
    return dispatch.call(
        "ragged_gather_backward", grad, list(indices), list(cu_seqlens), list(table_rows), list(needed)
    )


@_ragged_gather_backward.register_fake
def _(grad, indices, cu_seqlens, table_rows, needed, exact):
    return [grad.new_empty(rows if need else 0, grad.shape[1]) for rows, need in zip(table_rows, needed)]


def _gather_double_context(ctx, inputs, output):
    _, indices, cu_seqlens, ctx.table_rows, ctx.needed, ctx.exact = inputs
    ctx.indexed = [index is not None for index in indices]
    ctx.save_for_backward(*cu_seqlens, *(index for index in indices if index is not None))


def _gather_double_backward(ctx, grads):
    # Linear: its transpose is the gather itself, in which tables without a gradient count as zero.
    cu_seqlens, indices = _saved_sources(ctx)
    tables = [
        grad if need else grad.new_zeros(rows, grad.shape[1])
        for grad, rows, need in zip(grads, ctx.table_rows, ctx.needed)
    ]
    values, _, _ = _ragged_gather(tables, indices, cu_seqlens, ctx.exact)
    return values, _like_indices(indices), [None] * len(cu_seqlens), None, None, None


_ragged_gather_backward.register_autograd(_gather_double_backward, setup_context=_gather_double_context)


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
    op = "ragged_gather"
    if not isinstance(tables, (list, tuple)) or not tables:
        checks.fail(op, "tables", "a list of at least one tensor [R, D]", checks.describe(tables))
    for argument, values in (("indices", indices), ("cu_seqlens", cu_seqlens)):
        if not isinstance(values, (list, tuple)) or len(values) != len(tables):
            expected = f"a list of {len(tables)} tensors (one per table)"
            checks.fail(op, argument, expected, f"{type(values).__name__} of length {_length(values)}")
    main = tables[0]
    for i, (table, index) in enumerate(zip(tables, indices)):
        checks.check_tensor(op, f"tables[{i}]", table, "[R, D]", ANY_DTYPE)
        checks.check_size(op, f"tables[{i}]", table, 1, main.shape[1], "as tables[0]")
        checks.check_same_device(op, f"tables[{i}]", table, "tables[0]", main)
        if table.dtype != main.dtype:
            checks.fail(op, f"tables[{i}]", f"of the dtype of tables[0] ({main.dtype})", checks.describe(table))
        if index is not None:
            checks.check_tensor(op, f"indices[{i}]", index, "[T]", checks.INDICES)
            checks.check_same_device(op, f"indices[{i}]", index, "tables[0]", main)
    _check_sources(op, cu_seqlens, "tables[0]", main)
    return RaggedBatch(
        *dispatch.run(_registered_gather, _gather_kernel, list(tables), list(indices), list(cu_seqlens), exact)
    )


def _scatter_kernel(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    def check() -> None:
        _check_index_values("ragged_scatter_add", "index", index, num_rows)

    return dispatch.call("ragged_scatter_add", rows, index, num_rows, check=check)


_ragged_scatter_add = torch.library.custom_op("ztok::ragged_scatter_add", _scatter_kernel, mutates_args=())


@_ragged_scatter_add.register_fake
def _(rows, index, num_rows):
    return rows.new_empty(num_rows, rows.shape[1])


def _scatter_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return grad.index_select(0, index), None, None


_ragged_scatter_add.register_autograd(_scatter_backward, setup_context=_scatter_context)
_registered_scatter_add = torch.ops.ztok.ragged_scatter_add.default


def ragged_scatter_add(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Add rows into a zero table, in a fixed order: the transpose of `table[index]`.

    Args:
        rows: [T, D], float16, bfloat16, float32 or float64.
        index: int32 or int64 [T] with values in [0, num_rows).
        num_rows: rows R of the result.

    Returns:
        [R, D], dtype of `rows`, summed in fp32 (float64 for float64); the same bits every time. Differentiable in
        `rows`. O(T (D + log T) + R D).

    Raises:
        ValueError: wrong rank, dtype, device or size; under the value checks also an index out of range. Where values
            are not checked such rows are left out.
    """
    op = "ragged_scatter_add"
    checks.check_tensor(op, "rows", rows, "[T, D]", FLOATS)
    checks.check_tensor(op, "index", index, "[T]", checks.INDICES)
    checks.check_same_device(op, "index", index, "rows", rows)
    checks.check_size(op, "index", index, 0, rows.shape[0], "rows of rows")
    checks.check_count(op, "num_rows", num_rows)
    return dispatch.run(_registered_scatter_add, _scatter_kernel, rows, index, num_rows)
