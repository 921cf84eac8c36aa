"""`ordered_linear`: linear layer in float32 whose sums have one order, for the same bits everywhere."""

from __future__ import annotations

from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import cpp, triton
from ztok_fast.ops.int8 import reference
from ztok_fast.ops.int8.int8_linear import FLOAT32, check_out_features, special_rows
from ztok_fast.ops.int8.ordered_pack import ordered_pack
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import Case, Spec, Work, equal, randn, some_rows

OP = "ordered_linear"


def ordered_linear(x: Tensor, panels: Tensor, out_features: int, bias: Tensor | None = None) -> Tensor:
    """Linear layer in float32: y = x Wᵀ + bias, each sum by fused multiply-add from 0 over rising inputs.

    So a row's result has the same bits on every processor and backend, and whatever other rows and however many threads
    there are (docs/determinism.md).

    O(M in out) time, no extra memory.

    Args:
        x: float32 [M, in].
        panels: float32 [P, in, 16], the packed weight (`ordered_pack`).
        out_features: channels that are not padding, more than 16 (P - 1).
        bias: float32 [out_features], or None; added to the sum.

    Returns:
        float32 [M, out_features]. Not differentiable: a backward through it raises.

    Raises:
        ValueError: wrong rank, dtype, device or size.
    """
    given = checks.Arguments(OP)
    given.tensor("x", x, "[M, in]", FLOAT32)
    given.tensor("panels", panels, "[P, in, 16]", FLOAT32, empty=False)
    check_out_features(given, out_features, panels.shape[0], bias)
    return ORDERED_LINEAR(x, panels, out_features, bias)


def _fake(x, panels, out_features, bias):
    return x.new_empty(x.shape[0], out_features)


# --- specification


def make(sizes, dtype, generator):
    """`M` rows through a layer `in` -> `out`. Options: `bias`, `special` rows."""
    M, width, out = (sizes[name] for name in ("M", "in", "out"))
    return {
        "x": special_rows(generator, M, width) if sizes.get("special") else randn(generator, M, width),
        "panels": ordered_pack(randn(generator, out, width, scale=width**-0.5)),
        "out_features": out,
        "bias": randn(generator, out) if sizes.get("bias") else None,
    }


def check(inputs, y) -> None:
    """The bits of the reference on the CPU, for all rows or evenly spread ones."""
    moved = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    M = y.shape[0]
    if M > 0:
        rows = some_rows(M, inputs["out_features"], 1 << 14)  # the reference does twenty tensor operations per input
        equal(y.cpu()[rows], reference.ordered_linear(**{**moved, "x": moved["x"][rows]}), "y")


def _work(case, inputs):
    M, width, out = case["M"], case["in"], case["out"]
    return Work(2.0 * M * width * out, 4.0 * (width * out + M * (width + out)))


ORDERED_LINEAR = Op(
    "ordered_linear(Tensor x, Tensor panels, int out_features, Tensor? bias) -> Tensor",
    reference=reference.ordered_linear,
    fake=_fake,
    backends=(cpp(FLOAT32), triton("int8.triton:ordered_linear", FLOAT32)),
    spec=Spec(
        ordered_linear,
        make,
        samples=(
            {"M": 1, "in": 1, "out": 1},
            {"M": 7, "in": 65, "out": 33, "bias": True},
            {"M": 0, "in": 8, "out": 5},
            {"M": 45, "in": 30, "out": 40, "special": True},
            {"M": 13, "in": 64, "out": 144},
        ),
        check=check,
        dtypes=FLOAT32,
        cases=(
            Case({"M": 7, "in": 12, "out": 9}, set="tiny"),
            Case({"M": 128, "in": 256, "out": 768}, set="quick"),  # ztok-mini
            Case({"M": 1, "in": 576, "out": 1536}, cold=True),  # SmolLM2
            Case({"M": 128, "in": 576, "out": 1536}),
        ),
        work=_work,
        flops_of_reference=20.0,
    ),
)
