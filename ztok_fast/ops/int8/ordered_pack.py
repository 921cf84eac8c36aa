"""`ordered_pack`: a weight in panels of float32, the operand of `ordered_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import UP_TO_FLOAT32
from ztok_fast.ops.int8 import reference
from ztok_fast.ops.int8.int8_pack import backends_of_torch
from ztok_fast.ops.int8.reference import COLUMNS, round_up
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import Case, Mismatch, Spec, Work, randn

OP = "ordered_pack"


def ordered_pack(weight: Tensor) -> Tensor:
    """Pack a weight for `ordered_linear`: 16 output channels side by side.

    O(out · in) time and memory.

    Args:
        weight: [out, in], float16, bfloat16 or float32.

    Returns:
        float32 [P, in, 16] with P = ceil(out / 16); element [p, k, c] belongs to channel 16 p + c and input k, padding
        is 0. Not differentiable: a backward through it raises.

    Raises:
        ValueError: wrong rank, dtype or size.
    """
    checks.Arguments(OP).tensor("weight", weight, "[out, in]", UP_TO_FLOAT32, empty=False)
    return ORDERED_PACK(weight)


def _fake(weight):
    out, width = weight.shape
    return weight.new_empty(round_up(out, COLUMNS) // COLUMNS, width, COLUMNS, dtype=torch.float32)


# --- specification


def make(sizes, dtype, generator):
    """A weight `in` -> `out`."""
    return {"weight": randn(generator, sizes["out"], sizes["in"], dtype=dtype)}


def check(inputs, panels) -> None:
    """Every weight where it belongs, and 0 elsewhere."""
    weight = inputs["weight"].float()
    out, width = weight.shape
    channels = panels.transpose(1, 2).flatten(0, 1)
    if channels.shape != (round_up(out, COLUMNS), width) or not torch.equal(channels[:out], weight):
        raise Mismatch("panels: expected the weights")
    if bool(channels[out:].any()):
        raise Mismatch("padding: expected 0")


def _work(case, inputs):
    elements = case["out"] * case["in"]
    return Work(0.0, elements * (case.dtype.itemsize + 4))


ORDERED_PACK = Op(
    "ordered_pack(Tensor weight) -> Tensor",
    reference=reference.ordered_pack,
    fake=_fake,
    backends=backends_of_torch(reference.ordered_pack),
    spec=Spec(
        ordered_pack,
        make,
        samples=({"out": 1, "in": 1}, {"out": 33, "in": 5}, {"out": 16, "in": 20}),
        check=check,
        dtypes=UP_TO_FLOAT32,
        cases=(Case({"out": 9, "in": 12}, set="tiny"), Case({"out": 1536, "in": 576})),
        work=_work,
    ),
)
