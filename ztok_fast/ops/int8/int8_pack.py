"""`int8_pack`: a weight as int8 panels, the operand of `int8_linear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import UP_TO_FLOAT32, Backend
from ztok_fast.ops.int8 import reference
from ztok_fast.ops.int8.reference import COLUMNS, DEPTH, round_up
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import Case, Mismatch, Spec, Work, randn

OP = "int8_pack"


class Int8Panels(NamedTuple):
    """Result of `int8_pack`.

    Attributes:
        panels: uint8 [P, K64 / 4, 16, 4] with P = ceil(out / 16) and K64 = `in` rounded up to a multiple of 64. Element
            [p, k, c, i] is the integer of channel 16 p + c and input 4 k + i, plus 128; padding is 128. Processors and
            tensor cores read 4 inputs of a channel at once.
        scales: float32 [16 P], a channel's weight is its integers times its scale; 0 for padding.

    Of n weights both have a first dimension n.
    """

    panels: Tensor
    scales: Tensor


def int8_pack(weight: Tensor) -> Int8Panels:
    """Quantise a weight to int8, with a scale per output channel, and pack it for `int8_linear`.

    A channel's scale is a / 127 with a = max |weight|, its integers are rint(weight · (127 / a)): at most half a scale
    from the weight. The integers are the same on every machine (docs/determinism.md).

    O(out · in) time and memory.

    Args:
        weight: [out, in] or [n, out, in], float16, bfloat16 or float32; `in` at most 65,536, so that sums fit into
            32 bits.

    Returns:
        `Int8Panels`. A channel below 2⁻¹⁰⁰ has scale 0, one with NaN or infinity in it scale NaN. Not differentiable: a
        backward through it raises.

    Raises:
        ValueError: wrong rank, dtype or size.
    """
    checks.Arguments(OP).tensor("weight", weight, "[out, in] or [n, out, in]", UP_TO_FLOAT32, empty=False)
    if weight.shape[-1] > 1 << 16:
        checks.fail(OP, "weight", "of at most 65,536 inputs", checks.describe(weight))
    return Int8Panels(*INT8_PACK(weight))


def _fake(weight):
    *lead, out, width = weight.shape
    count, depth = round_up(out, COLUMNS) // COLUMNS, round_up(width, DEPTH)
    panels = weight.new_empty(*lead, count, depth // 4, COLUMNS, 4, dtype=torch.uint8)
    return panels, weight.new_empty(*lead, count * COLUMNS, dtype=torch.float32)


def backends_of_torch(function: Callable) -> tuple[Backend, ...]:
    """C++ and Triton backends that are PyTorch operations: one forced for a whole program leaves weights packed."""
    return (
        Backend("cpp", function, "cpu", UP_TO_FLOAT32, "cpu"),
        Backend("triton", function, "cuda", UP_TO_FLOAT32, "triton", (8, 0)),
    )


# --- specification


def make(sizes, dtype, generator):
    """A weight `in` -> `out`, or `n` of them; its first channel is 0."""
    lead = (sizes["n"],) if "n" in sizes else ()
    weight = randn(generator, *lead, sizes["out"], sizes["in"], dtype=dtype)
    weight[..., 0, :] = 0
    return {"weight": weight}


def check(inputs, result) -> None:
    """Integers times scales are the weight but for rounding, the largest integer of a channel is 127, padding is 0."""
    weight, (panels, scales) = inputs["weight"].double(), result
    *lead, out, width = weight.shape
    q = reference.int8_unpack(panels).double()
    if q.shape[:-2] != torch.Size(lead) or q.shape[-2:] != (round_up(out, COLUMNS), round_up(width, DEPTH)):
        raise Mismatch(f"panels: {list(panels.shape)} for a weight {list(weight.shape)}")
    if bool(q[..., out:, :].any()) or bool(q[..., width:].any()) or bool(scales[..., out:].any()):
        raise Mismatch("padding: expected integers and scales of 0")
    own = scales[..., :out, None].double()
    if bool(((q[..., :out, :width] * own - weight).abs() > 0.50001 * own).any()):
        raise Mismatch("panels: more than half a scale from the weight")
    if bool((q.abs().amax(-1)[..., :out] != torch.where(weight.any(-1), 127, 0)).any()):
        raise Mismatch("panels: expected 127 as the largest integer of a channel")


def _work(case, inputs):
    elements = case["out"] * case["in"]
    return Work(2.0 * elements, elements * (case.dtype.itemsize + 1) + 4 * case["out"])


INT8_PACK = Op(
    "int8_pack(Tensor weight) -> (Tensor, Tensor)",
    reference=reference.int8_pack,
    fake=_fake,
    backends=backends_of_torch(reference.int8_pack),
    spec=Spec(
        int8_pack,
        make,
        samples=(
            {"out": 1, "in": 1},
            {"out": 33, "in": 65},
            {"out": 16, "in": 64},
            {"n": 3, "out": 20, "in": 130},
        ),
        check=check,
        outputs=tuple,
        dtypes=UP_TO_FLOAT32,
        cases=(Case({"out": 9, "in": 12}, set="tiny"), Case({"out": 1536, "in": 576})),
        work=_work,
        flops_of_reference=4.0,
    ),
)
