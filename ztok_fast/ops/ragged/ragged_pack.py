"""`ragged_pack` and `ragged_unpack`: between padded and packed batches; each is the other's backward pass.

A packed tensor holds the rows of all sequences one after another; `cu_seqlens [B + 1]` says where each begins and
ends (first 0, non-decreasing, last = number of rows). The caller gives the sizes that depend on the data, so that no op
waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import ANY_DTYPE, cpp, cuda
from ztok_fast.ops.op import Op
from ztok_fast.ops.ragged import reference
from ztok_fast.ops.spec import BACKWARD, Case, CaseTable, Spec, Work, equal, lengths_of, offsets, randn


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
    given = checks.Arguments("ragged_pack")
    given.tensor("padded", padded, "[B, S, *]", ANY_DTYPE)
    given.tensor("cu_seqlens", cu_seqlens, "[B + 1]", checks.INDICES)
    checks.check_count(given.op, "total", total)
    return RAGGED_PACK(padded, cu_seqlens, total, exact)


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
    given = checks.Arguments(op)
    given.tensor("packed", packed, "[T, *]", ANY_DTYPE)
    given.tensor("cu_seqlens", cu_seqlens, "[B + 1]", checks.INDICES)
    checks.check_count(op, "max_length", max_length)
    if not isinstance(fill, (int, float)):
        checks.fail(op, "fill", "a number", checks.describe(fill))
    if not packed.dtype.is_floating_point:
        low, high = (0, 1) if packed.dtype == torch.bool else _integer_range(packed.dtype)
        if fill != fill or not low <= fill <= high or fill != int(fill):
            checks.fail(op, "fill", f"a value of {str(packed.dtype).removeprefix('torch.')}", repr(fill))
    return RAGGED_UNPACK(packed, cu_seqlens, max_length, float(fill), exact)


def _integer_range(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    # `fill` travels as a float, which holds integers up to 2⁵³ exactly.
    return max(info.min, -(2**53)), min(info.max, 2**53)


def _check_pack_values(padded: Tensor, cu_seqlens: Tensor, total: int, exact: bool) -> None:
    limit = padded.shape[1], "dimension 1 of padded"
    checks.check_cu_seqlens_values("ragged_pack", "cu_seqlens", cu_seqlens, total, exact, *limit)


def _check_unpack_values(packed: Tensor, cu_seqlens: Tensor, max_length: int, fill: float, exact: bool) -> None:
    limit = max_length, "max_length"
    checks.check_cu_seqlens_values("ragged_unpack", "cu_seqlens", cu_seqlens, packed.shape[0], exact, *limit)


def _pack_backward(args, outputs, grads, needs):
    padded, cu_seqlens, _, exact = args
    return RAGGED_UNPACK(grads[0], cu_seqlens, padded.shape[1], 0.0, exact), None, None, None


def _unpack_backward(args, outputs, grads, needs):
    packed, cu_seqlens, _, _, exact = args
    return RAGGED_PACK(grads[0], cu_seqlens, packed.shape[0], exact), None, None, None, None


# --- specification


def make_pack(sizes, dtype, generator):
    """A padded batch of width `D` and length `S`; `spare`: capacity for so many more rows than there are."""
    lengths, spare = lengths_of(sizes, generator), sizes.get("spare", 0)
    return {
        "padded": randn(generator, len(lengths), sizes["S"], sizes["D"], dtype=dtype),
        "cu_seqlens": offsets(lengths, generator.device, sizes.get("offsets", torch.int32)),
        "total": sum(lengths) + spare,
        "exact": not spare,
    }


def make_unpack(sizes, dtype, generator):
    """A packed batch of width `D`, to be padded to length `S`; `spare`: so many more rows than there are."""
    lengths, spare = lengths_of(sizes, generator), sizes.get("spare", 0)
    return {
        "packed": randn(generator, sum(lengths) + spare, sizes["D"], dtype=dtype),
        "cu_seqlens": offsets(lengths, generator.device, sizes.get("offsets", torch.int32)),
        "max_length": sizes["S"],
        "fill": sizes.get("fill", 0.0),
        "exact": not spare,
    }


def check_pack(inputs, result) -> None:
    """Row by row."""
    padded, lengths = inputs["padded"].detach(), inputs["cu_seqlens"].diff().tolist()
    rows = [rows[:length] for rows, length in zip(padded, lengths)]
    spare = padded.new_zeros(inputs["total"] - sum(lengths), *padded.shape[2:])
    equal(result.detach(), torch.cat([*rows, spare]), "packed")


def check_unpack(inputs, result) -> None:
    """Row by row."""
    packed, lengths = inputs["packed"].detach(), inputs["cu_seqlens"].diff().tolist()
    wanted = packed.new_full((len(lengths), inputs["max_length"], *packed.shape[1:]), inputs["fill"])
    for rows, part in zip(wanted, packed[: sum(lengths)].split(lengths)):
        rows[: len(part)] = part
    equal(result.detach(), wanted, "padded")


def _cases() -> tuple[Case, ...]:
    add = CaseTable("B", "S", "D")
    # hidden sizes: SmolLM2 576, Qwen3 1024, Llama 7B 4096
    add(3, 7, 5, "tiny", both=True)
    add(16, 256, 576, "quick")
    add(4, 64, 576, "default")
    add(32, 512, 576, "default")
    add(16, 1024, 1024, "default")
    add(16, 256, 576, "default", dtype=torch.bfloat16)
    add(16, 256, 576, "default", direction=BACKWARD)
    add(8, 1024, 4096, "full")
    for B, S, D in ((16, 512, 576), (64, 1024, 1024), (64, 1024, 4096)):
        add(B, S, D, "default", both=True, dtype=torch.bfloat16, devices=("cuda",))
    return add.cases()


def _work(case, inputs, packs) -> Work:
    row, total = case["D"] * case.dtype.itemsize, int(inputs["cu_seqlens"][-1])
    to_packed, to_padded = 2.0 * total * row, float((total + case["B"] * case["S"]) * row)
    if case.direction == BACKWARD:
        return Work(0.0, to_packed + to_padded)
    return Work(0.0, to_packed if packs else to_padded)


_SAMPLES = (
    {"lengths": (), "S": 3, "D": 2},
    {"lengths": (2, 0, 3, 1), "S": 3, "D": 5, "spare": 2, "offsets": torch.int64},
    {"lengths": (2, 0, 3), "S": 4, "D": 3},
    {"lengths": (1,), "S": 1, "D": 1},
    {"lengths": (0, 0), "S": 3, "D": 2},
    {"lengths": (0,), "S": 0, "D": 4, "spare": 3},
    {"lengths": (4, 1, 4), "S": 4, "D": 0},
    {"lengths": (17, 1, 2, 30), "S": 31, "D": 65},
    {"lengths": (9, 0, 4), "S": 9, "D": 16, "offsets": torch.int64},
)

RAGGED_PACK = Op(
    "ragged_pack(Tensor padded, Tensor cu_seqlens, SymInt total, bool exact) -> Tensor",
    reference=reference.ragged_pack,
    fake=lambda padded, cu_seqlens, total, exact: padded.new_empty(total, *padded.shape[2:]),
    backends=(cpp(checks_values=True), cuda()),
    backward=_pack_backward,
    linear=True,
    check_values=_check_pack_values,
    spec=Spec(
        ragged_pack,
        make_pack,
        samples=_SAMPLES,
        check=check_pack,
        differentiable=("padded",),
        cases=_cases(),
        work=lambda case, inputs: _work(case, inputs, packs=True),
    ),
)

RAGGED_UNPACK = Op(
    "ragged_unpack(Tensor packed, Tensor cu_seqlens, SymInt max_length, float fill, bool exact) -> Tensor",
    reference=reference.ragged_unpack,
    fake=lambda packed, cu_seqlens, max_length, fill, exact: packed.new_empty(
        cu_seqlens.shape[0] - 1, max_length, *packed.shape[1:]
    ),
    backends=(cpp(checks_values=True), cuda()),
    backward=_unpack_backward,
    linear=True,
    check_values=_check_unpack_values,
    spec=Spec(
        ragged_unpack,
        make_unpack,
        samples=(*_SAMPLES, {"lengths": (2, 5), "S": 6, "D": 3, "fill": float("-inf")}),
        check=check_unpack,
        differentiable=("packed",),
        cases=_cases(),
        work=lambda case, inputs: _work(case, inputs, packs=False),
    ),
)
