"""Public functions `ragged_pack` and `ragged_unpack`: checks, registration, autograd.

A packed tensor holds the rows of all sequences one after another; `cu_seqlens [B + 1]` says where each begins and
ends (first 0, non-decreasing, last = number of rows). Sizes that depend on the data are given by the caller, who
knows them, so that no op waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops import checks, dispatch
from ztok_fast.ops.requirements import ANY_DTYPE


def _check_rows(op: str, argument: str, value: object, layout: str, min_rank: int) -> None:
    if not isinstance(value, Tensor) or value.ndim < min_rank:
        checks.fail(op, argument, f"a tensor {layout}", checks.describe(value))
    if value.dtype not in ANY_DTYPE:
        checks.fail(op, argument, "of a real or bool dtype", checks.describe(value))


def _pack_kernel(padded: Tensor, cu_seqlens: Tensor, total: int, exact: bool) -> Tensor:
    def check() -> None:
        limit = padded.shape[1], "dimension 1 of padded"
        checks.check_cu_seqlens_values("ragged_pack", "cu_seqlens", cu_seqlens, total, exact, *limit)

    checks.check_covered(check, cu_seqlens, total, exact)
    return dispatch.call("ragged_pack", padded, cu_seqlens, total, check=check)


_ragged_pack = torch.library.custom_op("ztok::ragged_pack", _pack_kernel, mutates_args=())


@_ragged_pack.register_fake
def _(padded, cu_seqlens, total, exact):
    return padded.new_empty(total, *padded.shape[2:])


def _pack_context(ctx, inputs, output):
    padded, cu_seqlens, _, exact = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.max_length, ctx.exact = padded.shape[1], exact


def _pack_backward(ctx, grad):
    (cu_seqlens,) = ctx.saved_tensors
    return _ragged_unpack(grad, cu_seqlens, ctx.max_length, 0.0, ctx.exact), None, None, None


_ragged_pack.register_autograd(_pack_backward, setup_context=_pack_context)
_registered_pack = torch.ops.ztok.ragged_pack.default


def ragged_pack(padded: Tensor, cu_seqlens: Tensor, total: int, exact: bool = True) -> Tensor:
    """Drop the padding of a batch.

    Args:
        padded: [B, S, *], any real or bool dtype; sequence b fills the first rows of padded[b]. Slices, transposed
            and expanded batches are read in place; where one position's elements are not contiguous it is copied.
        cu_seqlens: int32 or int64 [B + 1].
        total: number of rows T = cu_seqlens[-1], known to the caller.
        exact: False when `total` is a capacity that `cu_seqlens` need not fill.

    Returns:
        [T, *], dtype of `padded`; rows past `cu_seqlens[-1]` are zero. Differentiable in `padded`; padding gets zero
        gradient. O(B S) at most for the backward pass, O(T log B) for this one.

    Raises:
        ValueError: wrong rank, dtype, device or size; under the value checks (`ztok_fast.ops.checks`) also
            `cu_seqlens` that do not add up to `total` (with `exact` False: that exceed it) or hold a sequence longer
            than S. Where values are not checked, no such input reads or writes outside of the tensors: what exceeds
            the capacity is left out, rows that no sequence covers are zero or unspecified.
    """
    op = "ragged_pack"
    _check_rows(op, "padded", padded, "[B, S, *]", 2)
    checks.check_cu_seqlens(op, "cu_seqlens", cu_seqlens, "padded", padded)
    checks.check_size(op, "cu_seqlens", cu_seqlens, 0, padded.shape[0] + 1, "sequences of padded + 1")
    checks.check_count(op, "total", total)
    return dispatch.run(_registered_pack, _pack_kernel, padded, cu_seqlens, total, exact)


def _unpack_kernel(packed: Tensor, cu_seqlens: Tensor, max_length: int, fill: float, exact: bool) -> Tensor:
    def check() -> None:
        limit = max_length, "max_length"
        checks.check_cu_seqlens_values("ragged_unpack", "cu_seqlens", cu_seqlens, packed.shape[0], exact, *limit)

    checks.check_covered(check, cu_seqlens, packed.shape[0], exact)
    return dispatch.call("ragged_unpack", packed, cu_seqlens, max_length, fill, check=check)


_ragged_unpack = torch.library.custom_op("ztok::ragged_unpack", _unpack_kernel, mutates_args=())


@_ragged_unpack.register_fake
def _(packed, cu_seqlens, max_length, fill, exact):
    return packed.new_empty(cu_seqlens.shape[0] - 1, max_length, *packed.shape[1:])


def _unpack_context(ctx, inputs, output):
    packed, cu_seqlens, _, _, exact = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.total, ctx.exact = packed.shape[0], exact


def _unpack_backward(ctx, grad):
    (cu_seqlens,) = ctx.saved_tensors
    return _ragged_pack(grad, cu_seqlens, ctx.total, ctx.exact), None, None, None, None


_ragged_unpack.register_autograd(_unpack_backward, setup_context=_unpack_context)
_registered_unpack = torch.ops.ztok.ragged_unpack.default


def ragged_unpack(packed: Tensor, cu_seqlens: Tensor, max_length: int, fill: float = 0.0, exact: bool = True) -> Tensor:
    """Pad a packed batch.

    Args:
        packed: [T, *], any real or bool dtype.
        cu_seqlens: int32 or int64 [B + 1].
        max_length: length S of the padded sequences, at least that of the longest one.
        fill: value of the padding; for integer and bool tensors one that the dtype holds.
        exact: False when `packed` may have more rows than `cu_seqlens` cover; those are ignored.

    Returns:
        [B, S, *], dtype of `packed`. Differentiable in `packed`. O(B S).

    Raises:
        ValueError: wrong rank, dtype, device or size, or a `fill` that the dtype does not hold; under the value
            checks (`ztok_fast.ops.checks`) also `cu_seqlens` that do not add up to T (with `exact` False: that
            exceed it) or hold a sequence longer than `max_length`. Where values are not checked a longer sequence is
            cut off, and nothing outside of the tensors is read.
    """
    op = "ragged_unpack"
    _check_rows(op, "packed", packed, "[T, *]", 1)
    checks.check_cu_seqlens(op, "cu_seqlens", cu_seqlens, "packed", packed)
    checks.check_count(op, "max_length", max_length)
    if not isinstance(fill, (int, float)):
        checks.fail(op, "fill", "a number", checks.describe(fill))
    if not packed.dtype.is_floating_point:
        low, high = (0, 1) if packed.dtype == torch.bool else _integer_range(packed.dtype)
        if fill != fill or not low <= fill <= high or fill != int(fill):
            checks.fail(op, "fill", f"a value of {str(packed.dtype).removeprefix('torch.')}", repr(fill))
    return dispatch.run(_registered_unpack, _unpack_kernel, packed, cu_seqlens, max_length, float(fill), exact)


def _integer_range(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    # `fill` travels as a float, which holds integers up to 2⁵³ exactly.
    return max(info.min, -(2**53)), min(info.max, 2**53)
