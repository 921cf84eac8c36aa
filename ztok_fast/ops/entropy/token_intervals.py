"""`token_intervals`: where tokens lie in the distributions that logits give, in the same integers everywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import cpp, triton
from ztok_fast.ops.entropy import reference
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import Case, Spec, Work, randn, same_as

OP = "token_intervals"
MOST_TOKENS = 500_000  # their total stays below the range coder's limit


class Intervals(NamedTuple):
    """Symbols for `range_encode`: the counts of symbol i are [start[i], start[i] + size[i]) of total[i].

    Attributes:
        start: int64 [T].
        size: int64 [T], at least 1.
        total: int64 [T], below 2^49.
    """

    start: Tensor
    size: Tensor
    total: Tensor


def token_intervals(logits: Tensor, targets: Tensor) -> Intervals:
    """The intervals of tokens among the cumulative counts of their rows of logits.

    The count of a token is 1 + rint(exp(logit - largest) · 2^30), with the `exp` of docs/determinism.md, and tokens lie
    in the order of their indices. The integers are the same for every batch, backend, instruction set and number of
    threads. -log2(size / total) exceeds -log2 of the probability in float64 by at most V / 2^28 bit (0.0002 at 49,152
    tokens); no token costs more than log2(total), which is below 49 bits.

    O(T V) time, O(T) memory; the counts of a row are never held.

    Args:
        logits: float32 [T, V], finite, V at most 500,000; rows may be strided.
        targets: int32 or int64 [T], in [0, V).

    Returns:
        `Intervals`. Not differentiable. On a GPU, where values are not checked, a row that is not finite has total 0,
        which `range_encode` refuses.

    Raises:
        ValueError: wrong rank, dtype, device or size; a logit that is NaN or infinite; a target out of range.
    """
    given = checks.Arguments(OP)
    check_logits(given, logits, "[T, V]")
    given.tensor("targets", targets, "[T]", checks.INDICES)
    return Intervals(*TOKEN_INTERVALS(logits, targets.long()))


def check_logits(given: checks.Arguments, logits: Tensor, layout: str) -> None:
    """float32 logits of a number of tokens within limits."""
    given.tensor("logits", logits, layout, (torch.float32,))
    if not 1 <= logits.shape[1] <= MOST_TOKENS:
        checks.fail(given.op, "logits", f"of 1 to {MOST_TOKENS:,} columns", checks.describe(logits))


def _check_values(logits: Tensor, targets: Tensor) -> None:
    checks.check_finite_values(OP, "logits", logits)
    size = logits.shape[1]
    checks.check_range_values(OP, "targets", targets, 0, size - 1, f"in [0, {size})")


def _fake(logits, targets):
    return tuple(torch.empty_like(targets, memory_format=torch.contiguous_format) for _ in range(3))


# --- specification


def make(sizes, dtype, generator):
    """`T` rows of `V` logits, normal with deviation `scale`; `ties` leaves only integers."""
    T, V = sizes["T"], sizes["V"]
    logits = randn(generator, T, V, dtype=dtype, scale=sizes.get("scale", 3.0))
    targets = torch.randint(0, V, (T,), generator=generator, device=generator.device)
    return {"logits": logits.round() if sizes.get("ties") else logits, "targets": targets}


def _work(case, inputs):
    return Work(20.0 * case["T"] * case["V"], 4 * case["T"] * case["V"] + 32 * case["T"])


TOKEN_INTERVALS = Op(
    "token_intervals(Tensor logits, Tensor targets) -> (Tensor, Tensor, Tensor)",
    reference=reference.token_intervals,
    fake=_fake,
    backends=(
        cpp((torch.float32,), checks_values=True),
        triton("entropy.triton:token_intervals", (torch.float32,)),
    ),
    check_values=_check_values,
    spec=Spec(
        token_intervals,
        make,
        samples=(
            {"T": 1, "V": 1},
            {"T": 7, "V": 2},
            {"T": 0, "V": 5},
            {"T": 5, "V": 16, "scale": 100.0},
            {"T": 13, "V": 129, "ties": True},
            {"T": 5, "V": 2047},
            {"T": 3, "V": 3000, "scale": 0.0},
        ),
        check=same_as(reference.token_intervals),
        outputs=tuple,
        dtypes=(torch.float32,),
        cases=(
            Case({"T": 9, "V": 50}, set="tiny"),
            Case({"T": 2048, "V": 2048}, set="quick"),  # ztok-mini
            Case({"T": 256, "V": 49152}),  # SmolLM2
        ),
        work=_work,
        flops_of_reference=20.0,
    ),
)
