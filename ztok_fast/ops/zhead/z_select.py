"""`z_select`: the next code of every sequence from the Z rows alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import UP_TO_FLOAT32, cpp, triton
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import Case, CaseTable, Mismatch, Spec, Work, close, randn
from ztok_fast.ops.zhead import reference

OP = "z_select"


class Selection(NamedTuple):
    """Chosen codes.

    Attributes:
        codes: int32 [B], in [0, V).
        log_probs: fp32 [B], natural logarithm of a code's probability at temperature 1 among all V codes.
    """

    codes: Tensor
    log_probs: Tensor


def z_select(
    hidden: Tensor,
    rows: Tensor,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    row_ids: Tensor | None = None,
    step: int = 0,
) -> Selection:
    """Choose the next code of every sequence from the logits `hidden @ rows.T`.

    Sampling is by the Gumbel-max method (Maddison, Tarlow and Minka, "A* sampling", arXiv 1411.0030, section 2): the
    code of the largest logit / temperature + noise. The noise is a function of (seed, row id, step, code) alone, made
    by the counter-based generator Philox4x32-10 (Salmon et al., SC 2011), so a sequence draws the same codes whatever
    batch it is in and at whatever place. The exact layout of counter and key is that of
    `ztok_fast.ops.zhead.reference.gumbel_noise`.

    O(B V D) time; extra memory O(B V / 128) in compiled code, with `top_p` below 1 O(V) per row at work.

    Args:
        hidden: [B, D], float16, bfloat16, float32 or float64.
        rows: [V, D], dtype of `hidden`: one row per code; an end-of-Z row is one more code.
        temperature: 0 for the arg-max (of equal logits the lowest code), above 0 to sample.
        top_p: in (0, 1]; sample only among the smallest set of codes whose probability, at this temperature, reaches
            top_p (of equally probable codes the lower ones come first). Without effect at temperature 0. Holtzman et
            al., arXiv 1904.09751.
        seed: in [0, 2⁶³).
        row_ids: int64 [B], what identifies each sequence to the generator; None for 0 to B - 1.
        step: in [0, 2³²), what identifies the draw within a sequence.

    Returns:
        A `Selection`. Not differentiable: a backward pass through it raises. A row of which any logit is NaN or
        infinite gets code 0 and log-probability NaN.

    Raises:
        ValueError: wrong rank, dtype, device or size, no codes, or a number out of its range.
    """
    given = checks.Arguments(OP)
    check_head(given, hidden, rows, "[B, D]")
    check_sampling(OP, temperature, top_p, seed, step)
    if row_ids is not None:
        given.tensor("row_ids", row_ids, "[B]", (torch.int64,))
    sampling = float(temperature), float(top_p), seed, row_ids, step
    return Selection(*Z_SELECT(hidden, rows, *sampling))


def check_head(given: checks.Arguments, hidden: Tensor, rows: Tensor, layout: str) -> None:
    """Hidden states and the rows that are multiplied with them."""
    given.tensor("hidden", hidden, layout)
    given.tensor("rows", rows, "[V, D]", "hidden", empty=False)


def check_sampling(op: str, temperature: object, top_p: object, seed: Any, step: Any) -> None:
    """What a draw is made by."""
    if not checks.is_number(temperature) or not 0 <= temperature < math.inf:
        checks.fail(op, "temperature", "a finite number of at least 0", repr(temperature))
    if not checks.is_number(top_p) or not 0 < top_p <= 1:
        checks.fail(op, "top_p", "a number in (0, 1]", repr(top_p))
    for argument, value, bits in (("seed", seed, 63), ("step", step, 32)):
        checks.check_count(op, argument, value)
        if value >= 2**bits:
            checks.fail(op, argument, f"below 2**{bits}", value)


def _fake(hidden, *_):
    num_rows = hidden.shape[0]
    return hidden.new_empty(num_rows, dtype=torch.int32), hidden.new_empty(num_rows, dtype=torch.float32)


# --- specification


def make(sizes, dtype, generator):
    """`B` sequences and `V` codes of width `D`; `temperature` and `top_p` as the op has them; `ids`: row ids are given.

    `tie`: all codes are the same.
    """
    B, V, D = sizes["B"], sizes["V"], sizes["D"]
    rows = randn(generator, V, D, scale=D**-0.5, dtype=dtype)
    ids = torch.arange(B, device=generator.device) * 3 + 2**40 if sizes.get("ids") else None
    return {
        "hidden": randn(generator, B, D, dtype=dtype),
        "rows": rows[:1].expand(V, D) if sizes.get("tie") else rows,
        "temperature": sizes.get("temperature", 0.0),
        "top_p": sizes.get("top_p", 1.0),
        "seed": 7,
        "row_ids": ids,
    }


def check(inputs, result) -> None:
    """The arg-max of the float64 scores, noise included, up to the rounding of float32 logits; and its probability."""
    hidden, rows, temperature = (inputs[name] for name in ("hidden", "rows", "temperature"))
    (B, _), V = hidden.shape, rows.shape[0]
    codes, log_probs = result
    if codes.dtype != torch.int32 or log_probs.dtype != torch.float32 or log_probs.shape != (B,):
        raise Mismatch(f"expected int32 and float32 [{B}], got {codes.dtype} and {log_probs.dtype}")
    logits = scores = hidden.double() @ rows.double().T
    if temperature:
        ids = inputs["row_ids"]
        ids = torch.arange(B, device=logits.device) if ids is None else ids
        scores = logits / temperature
        allowed = reference.nucleus_mask(scores, inputs["top_p"])
        scores = (scores + reference.gumbel_noise(V, ids, inputs["seed"], 0)).masked_fill(~allowed, -math.inf)
    check_arg_max(scores, codes)
    chosen = logits.log_softmax(-1).gather(-1, codes.long()[:, None])[:, 0]
    close(log_probs, chosen, torch.float32, 5, "log_probs")


def check_arg_max(scores, codes) -> None:
    """The code of the largest score, or of one that float32 rounding of the logits cannot tell from it."""
    if (
        codes.shape != scores.shape[:1]
        or codes.numel()
        and not 0 <= int(codes.min()) <= int(codes.max()) < len(scores.T)
    ):
        raise Mismatch(f"codes: expected {list(scores.shape[:1])} in [0, {scores.shape[1]}), got {list(codes.shape)}")
    short = scores.amax(-1) - scores.gather(-1, codes.long()[:, None])[:, 0]
    size = scores.masked_fill(scores.isinf(), 0).abs().amax(-1)
    wrong = short > 2 * torch.finfo(torch.float32).eps * size
    if bool(wrong.any()):
        raise Mismatch(f"codes: {int(wrong.sum())} of {len(codes)} are not the arg-max")


# hidden sizes of models
_SMOLLM2, _QWEN3 = 576, 1024


def _cases() -> tuple[Case, ...]:
    add = CaseTable("B", "V", "D", "temperature", cold=True)
    add(5, 41, 12, 0.0, "tiny")
    add(5, 41, 12, 1.0, "tiny")
    add(1, 1025, _SMOLLM2, 0.0, "quick")
    for B in (1, 16, 256):
        add(B, 4097, _SMOLLM2, 0.0, "default")
    add(16, 1025, _SMOLLM2, 0.0, "default")
    add(16, 4097, _QWEN3, 0.0, "default")
    add(1, 4097, _SMOLLM2, 1.0, "default")
    add(16, 4097, _SMOLLM2, 1.0, "default")
    add(16, 4097, _SMOLLM2, 0.0, "default", dtype=torch.bfloat16)
    for B in (1, 16, 256):
        for temperature in (0.0, 1.0):
            smallest = "full" if temperature else "default"
            add(B, 4097, _QWEN3, temperature, smallest, dtype=torch.bfloat16, devices=("cuda",))
            add(B, 4097, _QWEN3, temperature, "full")
    return add.cases()


def _work(case, inputs):
    B, V, D, size = case["B"], case["V"], case["D"], case.dtype.itemsize
    return Work(2.0 * B * V * D, (B + V) * D * size + 8 * B)


def _no_nucleus(hidden, rows, temperature, top_p, *_) -> bool:
    return top_p == 1 or temperature == 0


Z_SELECT = Op(
    "z_select(Tensor hidden, Tensor rows, float temperature, float top_p, int seed, Tensor? row_ids, int step)"
    " -> (Tensor, Tensor)",
    reference=reference.z_select,
    fake=_fake,
    backends=(
        cpp(UP_TO_FLOAT32),
        triton(
            "zhead.triton:z_select",
            condition=("top_p is 1 or the temperature 0", _no_nucleus),
        ),
    ),
    spec=Spec(
        z_select,
        make,
        samples=(
            {"B": 3, "V": 9, "D": 4},
            {"B": 5, "V": 41, "D": 12, "temperature": 0.8, "ids": True},
            {"B": 1, "V": 1, "D": 1, "temperature": 1.0},
            {"B": 0, "V": 5, "D": 8},
            {"B": 9, "V": 130, "D": 33},
            {"B": 37, "V": 100, "D": 17, "temperature": 0.5},
            {"B": 2, "V": 300, "D": 65, "temperature": 1.5},
            {"B": 4, "V": 65, "D": 19, "tie": True},
            {"B": 3, "V": 17, "D": 8},
            {"B": 37, "V": 17, "D": 15, "temperature": 0.8, "top_p": 0.7},
            {"B": 3, "V": 100, "D": 65, "temperature": 0.8, "top_p": 0.7, "ids": True},
            {"B": 1, "V": 1, "D": 3, "temperature": 0.8, "top_p": 0.7},
        ),
        check=check,
        outputs=tuple,
        cases=_cases(),
        work=_work,
        flops_of_reference=3.0,
    ),
)
