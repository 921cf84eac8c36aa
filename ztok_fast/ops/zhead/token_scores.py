"""`token_scores`: what a language model's head says of given tokens, without ever holding its logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import UP_TO_FLOAT32, cpp, triton
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import Case, Mismatch, Spec, Work, close, randn
from ztok_fast.ops.zhead.z_select import check_head

OP = "token_scores"
# elements of the largest block of logits that the reference holds
_BLOCK_ELEMENTS = 1 << 22


class TokenScores(NamedTuple):
    """Result of `token_scores` for T tokens.

    Attributes:
        surprisal: float32 (float64 if an input is float64) [T], bits: -log2 of the token's probability.
        rank: int32 [T], how many tokens the model puts before it; 0 where its arg-max is right.
    """

    surprisal: Tensor
    rank: Tensor


def token_scores(hidden: Tensor, rows: Tensor, targets: Tensor) -> TokenScores:
    """Surprisal and rank of tokens under the logits `hidden @ rows.T`.

    Logits are made block by block and forgotten (as in Wijmans et al., "Cut your losses in large-vocabulary language
    models", arXiv 2411.09009). Of equal logits the one with the lower index comes first. A rank may count logits that
    are within float32 rounding of the target's on either side.

    O(T V D) time; extra memory O(T D) at most, never of size T V.

    Args:
        hidden: [T, D], float16, bfloat16, float32 or float64: the hidden state from which each token is predicted.
        rows: [V, D], dtype of `hidden`: the head.
        targets: int32 or int64 [T], the tokens, in [0, V); -1 for a row that is not asked about.

    Returns:
        `TokenScores`. Not differentiable: a backward through it raises. Surprisal 0 and rank -1 where the target is -1;
        NaN and -1 for a row of which any logit is NaN or infinite.

    Raises:
        ValueError: wrong rank, dtype, device or size, no rows; targets out of range.
    """
    given = checks.Arguments(OP)
    check_head(given, hidden, rows, "[T, D]")
    given.tensor("targets", targets, "[T]", checks.INDICES)
    return TokenScores(*TOKEN_SCORES(hidden, rows, targets.long()))


def _check_values(hidden: Tensor, rows: Tensor, targets: Tensor) -> None:
    size = rows.shape[0]
    checks.check_range_values(OP, "targets", targets, -1, size - 1, f"in [-1, {size})")


def _reference(hidden: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    surprisal, rank = _fake(hidden, rows, targets)
    step = max(1, _BLOCK_ELEMENTS // rows.shape[0])
    order = torch.arange(rows.shape[0], device=rows.device)
    for start in range(0, hidden.shape[0], step):
        part = slice(start, start + step)
        logits, target = hidden[part].double() @ rows.double().T, targets[part, None]
        own = logits.gather(1, target.clamp(min=0))
        bits = (logits.logsumexp(1) - own[:, 0]) / math.log(2)
        before = ((logits > own) | (logits == own) & (order < target)).sum(1)
        asked, finite = target[:, 0] >= 0, logits.isfinite().all(1)
        surprisal[part] = torch.where(asked, torch.where(finite, bits, torch.nan), 0).to(surprisal.dtype)
        rank[part] = torch.where(asked & finite, before, -1).int()
    return surprisal, rank


def _fake(hidden, rows, targets):
    dtype = checks.compute_dtype(hidden, rows)
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=torch.int32)


# --- specification


def make(sizes, dtype, generator):
    """`T` tokens of a vocabulary of `V`, `D` wide; every fifth is not asked about. `scale` multiplies the logits."""
    T, V, D = sizes["T"], sizes["V"], sizes["D"]
    targets = torch.randint(0, V, (T,), generator=generator, device=generator.device)
    targets[4::5] = -1
    return {
        "hidden": randn(generator, T, D, dtype=dtype, scale=sizes.get("scale", 1.0)),
        "rows": randn(generator, V, D, scale=D**-0.5, dtype=dtype),
        "targets": targets,
    }


def check(inputs, result) -> None:
    """Surprisal as in float64; a rank between those that rounding of the logits allows."""
    hidden, rows, targets = inputs["hidden"].double(), inputs["rows"].double(), inputs["targets"]
    expected, _ = _reference(hidden, rows, targets)
    close(result.surprisal, expected, checks.compute_dtype(inputs["hidden"]), 5, "surprisal")
    logits = hidden @ rows.T
    own = logits.gather(1, targets.clamp(min=0)[:, None])
    relative = (hidden.shape[1] + 4) * torch.finfo(torch.float32).eps
    error_bound = relative * (hidden.abs() @ rows.abs().T).amax(1, keepdim=True)
    asked = targets >= 0
    least, most = (logits > own + error_bound).sum(1), (logits >= own - error_bound).sum(1) - 1
    if bool(((result.rank < least) | (result.rank > most))[asked].any()) or bool((result.rank[~asked] != -1).any()):
        raise Mismatch("rank: outside of what rounding of the logits allows")


def _work(case, inputs):
    T, V, D, size = case["T"], case["V"], case["D"], case.dtype.itemsize
    return Work(2.0 * T * V * D, (T + V) * D * size + 16 * T)


TOKEN_SCORES = Op(
    "token_scores(Tensor hidden, Tensor rows, Tensor targets) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    backends=(cpp(UP_TO_FLOAT32, checks_values=True), triton("zhead.triton_token_scores:token_scores")),
    check_values=_check_values,
    spec=Spec(
        token_scores,
        make,
        samples=(
            {"T": 1, "V": 1, "D": 1},
            {"T": 7, "V": 31, "D": 5},
            {"T": 0, "V": 5, "D": 8},
            {"T": 13, "V": 130, "D": 33},
            {"T": 37, "V": 300, "D": 17, "scale": 30.0},
            {"T": 9, "V": 129, "D": 300},
        ),
        check=check,
        outputs=tuple,
        cases=(
            Case({"T": 9, "V": 50, "D": 12}, set="tiny"),
            Case({"T": 2048, "V": 2048, "D": 256}, set="quick"),  # ztok-mini
            Case({"T": 512, "V": 49152, "D": 576}),  # SmolLM2
            Case({"T": 64, "V": 2048, "D": 256}),
            Case({"T": 4096, "V": 49152, "D": 576}, torch.bfloat16, devices=("cuda",)),
        ),
        work=_work,
        flops_of_reference=3.0,
    ),
)
