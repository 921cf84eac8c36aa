"""`fold_lora`: a LoRA adapter added to its weight, with the same bits everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import UP_TO_FLOAT32
from ztok_fast.ops.int8 import reference
from ztok_fast.ops.int8.int8_pack import backends_of_torch
from ztok_fast.ops.int8.ordered_linear import ORDERED_LINEAR
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import Case, Spec, Work, close, equal, randn

OP = "fold_lora"


def fold_lora(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The weight of a linear layer with its adapter folded in: W + scale · (B A), in float32.

    Each element of B A is summed by fused multiply-add, from 0 and over the ranks in order. The product with `scale`
    and the addition of W are rounded once each. So the result has the same bits everywhere (docs/determinism.md).

    O(out · in · r) time, O(out · in) memory.

    Args:
        weight: [out, in], float16, bfloat16 or float32.
        A: [r, in], any of these dtypes.
        B: [out, r], any of these dtypes.
        scale: usually alpha / r; rounded to float32.

    Returns:
        float32 [out, in]. Not differentiable: a backward through it raises.

    Raises:
        ValueError: wrong rank, dtype, device or size.
    """
    given = checks.Arguments(OP)
    given.tensor("weight", weight, "[out, in]", UP_TO_FLOAT32, empty=False)
    given.tensor("A", A, "[r, in]", UP_TO_FLOAT32, empty=False)
    given.tensor("B", B, "[out, r]", UP_TO_FLOAT32)
    return FOLD_LORA(weight, A, B, float(scale))


def _fake(weight, A, B, scale):
    return weight.new_empty(weight.shape, dtype=torch.float32)


# --- specification


def make(sizes, dtype, generator):
    """A weight `in` -> `out` and an adapter of rank `r`."""
    out, width, r = (sizes[name] for name in ("out", "in", "r"))
    return {
        "weight": randn(generator, out, width, scale=width**-0.5, dtype=dtype),
        "A": randn(generator, r, width, scale=width**-0.5, dtype=dtype),
        "B": randn(generator, out, r, scale=r**-0.5),
        "scale": 0.7,
    }


def check(inputs, folded) -> None:
    """The bits of the reference on the CPU, which are close to the answer in float64."""
    weight, A, B = (inputs[name].cpu() for name in ("weight", "A", "B"))
    close(folded.cpu(), weight.double() + inputs["scale"] * (B.double() @ A.double()), torch.float32, 1, "folded")
    equal(folded.cpu(), reference.fold_lora(weight, A, B, inputs["scale"]), "folded")


def _work(case, inputs):
    out, width, r = case["out"], case["in"], case["r"]
    return Work(2.0 * out * width * (r + 1), case.dtype.itemsize * (out * width + r * (out + width)) + 4 * out * width)


def _by_best_product(weight, A, B, scale):
    return reference.fold_lora(weight, A, B, scale, ORDERED_LINEAR)


FOLD_LORA = Op(
    "fold_lora(Tensor weight, Tensor A, Tensor B, float scale) -> Tensor",
    reference=reference.fold_lora,
    fake=_fake,
    backends=backends_of_torch(_by_best_product),
    spec=Spec(
        fold_lora,
        make,
        samples=({"out": 1, "in": 1, "r": 1}, {"out": 33, "in": 21, "r": 5}, {"out": 16, "in": 48, "r": 16}),
        check=check,
        dtypes=UP_TO_FLOAT32,
        cases=(Case({"out": 9, "in": 12, "r": 2}, set="tiny"), Case({"out": 1536, "in": 576, "r": 16})),
        work=_work,
        flops_of_reference=20.0,
    ),
)
