"""`int8_linear`: linear layer in int8 whose results have the same bits everywhere, for several adapters in a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import cpp, triton
from ztok_fast.ops.int8 import reference
from ztok_fast.ops.int8.int8_pack import int8_pack
from ztok_fast.ops.int8.reference import COLUMNS, DEPTH, round_up
from ztok_fast.ops.lora.lora_linear import check_adapter_values, check_choice_of_adapters, some_adapters
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import Case, Spec, Work, equal, randn

OP = "int8_linear"
FLOAT32 = (torch.float32,)


def int8_linear(
    x: Tensor,
    panels: Tensor,
    scales: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    adapters: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Linear layer in int8: y = x Wᵀ + bias, every row with the weight of its own adapter.

    Each row of x is quantised as `int8_pack` quantises channels. Its sum with a channel is an exact integer s, and
    the result is (s · channel scale) · row scale + bias, each operation rounded once. So a row's result has the same
    bits on every processor and backend, and whatever other rows and however many threads there are
    (docs/determinism.md).

    O(M in out) time for any number of adapters, of which those with rows are read; O(M in) extra memory.

    Args:
        x: float32 [M, in].
        panels: uint8 [n, P, K64 / 4, 16, 4], the packed weights of n adapters (`int8_pack`), LoRA folded into them
            (`fold_lora`); without the first dimension for n = 1.
        scales: float32 [n, 16 P], or [16 P].
        out_features: channels that are not padding, more than 16 (P - 1).
        bias: float32 [out_features], or None.
        adapters: the adapter of each row, int32 [M] with values in [0, n); with `cu_seqlens` that of each sequence,
            int32 [B]; None for adapter 0 everywhere, which needs n = 1.
        cu_seqlens: int32 or int64 [B + 1], only with `adapters`.

    Returns:
        float32 [M, out_features]. Not differentiable: a backward through it raises. A row with NaN or infinity in it
        gives NaN.

    Raises:
        ValueError: wrong rank, dtype, device or size, `adapters` missing with n > 1; under the value checks
            (`ztok_fast.ops.checks`) also an adapter out of range and `cu_seqlens` that do not add up to M.
    """
    given = checks.Arguments(OP)
    given.tensor("x", x, "[M, in]", FLOAT32)
    given.tensor("panels", panels, "[n, P, K64 / 4, 16, 4] or [P, K64 / 4, 16, 4]", (torch.uint8,), empty=False)
    given.tensor("scales", scales, "[n, 16 P] or [16 P]", FLOAT32)
    if scales.ndim != panels.ndim - 3:
        checks.fail(OP, "scales", "with a dimension of adapters where panels has one", checks.describe(scales))
    given.size("panels", -3, round_up(x.shape[1], DEPTH) // 4, "a quarter of the padded width of x")
    given.size("scales", -1, panels.shape[-4] * COLUMNS, "channels of panels")
    if panels.ndim == 4:
        panels, scales = panels[None], scales[None]
    check_out_features(given, out_features, panels.shape[1], bias)
    check_choice_of_adapters(given, "panels", panels.shape[0], adapters, cu_seqlens)
    return INT8_LINEAR(x, panels, scales, out_features, bias, adapters, cu_seqlens)


def check_out_features(given: checks.Arguments, out_features: int, count: int, bias: Tensor | None) -> None:
    """The checks of `out_features` for `count` panels, and of a bias of that size."""
    checks.check_count(given.op, "out_features", out_features)
    if not COLUMNS * (count - 1) < out_features <= COLUMNS * count:
        expected = f"above {COLUMNS * (count - 1)} and at most {COLUMNS * count} (the channels of {count} panels)"
        checks.fail(given.op, "out_features", expected, out_features)
    if bias is not None:
        given.tensor("bias", bias, "[out_features]", FLOAT32)
        given.size("bias", 0, out_features, "out_features")


def _check_values(x, panels, scales, out_features, bias, adapters, cu_seqlens) -> None:
    check_adapter_values(OP, 0, panels.shape[0], adapters, cu_seqlens, x.shape[0])


def _fake(x, panels, scales, out_features, *_):
    return x.new_empty(x.shape[0], out_features)


# --- specification


def special_rows(generator, rows: int, width: int) -> Tensor:
    """float32 rows; among every 16 some that are zero, subnormal, small, large, infinite and NaN."""
    x = randn(generator, rows, width)
    x[1::16] = 0
    x[2::16] *= 1e-42
    x[3::16] *= 2.0**-99
    x[4::16] *= 1e37
    x[5::16, width // 2] = torch.inf
    x[6::16, -1] = torch.nan
    x[7::16] = x[7::16].sign() * 3  # all of a row's integers are 127 or -127
    return x


def make(sizes, dtype, generator):
    """`M` rows through a layer `in` -> `out` with `n` adapters, for sequences in turn or, with `by_row`, by row."""
    M, width, out, n = (sizes[name] for name in ("M", "in", "out", "n"))
    chosen = some_adapters(sizes, 0, generator)
    panels, scales = int8_pack(randn(generator, n, out, width, scale=width**-0.5))
    return {
        "x": special_rows(generator, M, width) if sizes.get("special") else randn(generator, M, width),
        "panels": panels if n > 1 else panels[0],
        "scales": scales if n > 1 else scales[0],
        "out_features": out,
        "bias": randn(generator, out) if sizes.get("bias") else None,
        **chosen,
    }


def check(inputs, y) -> None:
    """The bits of the reference on the CPU."""
    moved = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    if moved["panels"].ndim == 4:
        moved.update(panels=moved["panels"][None], scales=moved["scales"][None])
    equal(y.cpu(), reference.int8_linear(**moved), "y")


def _work(case, inputs):
    M, width, out, n = case["M"], case["in"], case["out"], case["n"]
    return Work(2.0 * M * width * out, n * width * out + 4.0 * (n * out + M * (width + out)))


INT8_LINEAR = Op(
    "int8_linear(Tensor x, Tensor panels, Tensor scales, int out_features, Tensor? bias, Tensor? adapters, "
    "Tensor? cu_seqlens) -> Tensor",
    reference=reference.int8_linear,
    fake=_fake,
    backends=(cpp(FLOAT32, checks_values=True), triton("int8.triton:int8_linear", FLOAT32)),
    check_values=_check_values,
    spec=Spec(
        int8_linear,
        make,
        samples=(
            {"M": 1, "in": 1, "out": 1, "n": 1},
            {"M": 7, "in": 65, "out": 33, "n": 1, "bias": True},
            {"M": 0, "in": 8, "out": 5, "n": 1},
            {"M": 45, "in": 130, "out": 40, "n": 1, "special": True},
            {"M": 37, "in": 64, "out": 16, "n": 3, "bias": True, "special": True},
            {"M": 29, "in": 100, "out": 47, "n": 2, "by_row": True},
        ),
        check=check,
        dtypes=FLOAT32,
        cases=(
            Case({"M": 7, "in": 12, "out": 9, "n": 2}, set="tiny"),
            Case({"M": 128, "in": 256, "out": 768, "n": 1}, set="quick"),  # ztok-mini
            Case({"M": 1, "in": 576, "out": 1536, "n": 1}, set="quick", cold=True),  # SmolLM2
            Case({"M": 12, "in": 576, "out": 1536, "n": 1}, cold=True),
            Case({"M": 128, "in": 576, "out": 1536, "n": 1}),
            Case({"M": 128, "in": 1536, "out": 576, "n": 1}),
            Case({"M": 128, "in": 576, "out": 1536, "n": 3}),
            Case({"M": 4096, "in": 576, "out": 1536, "n": 1}, devices=("cuda",)),
        ),
        work=_work,
    ),
)
