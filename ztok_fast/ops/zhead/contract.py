"""Public function `z_select`: checks and registration."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks, dispatch

OP = "z_select"


class Selection(NamedTuple):
    """Chosen codes.

    Attributes:
        codes: int32 [B], in [0, V).
        log_probs: fp32 [B], natural logarithm of a code's probability at temperature 1 among all V codes.
    """

    codes: Tensor
    log_probs: Tensor


def _kernel(
    hidden: Tensor, rows: Tensor, temperature: float, top_p: float, seed: int, row_ids: Tensor | None, step: int
) -> tuple[Tensor, Tensor]:
    return dispatch.call(OP, hidden, rows, temperature, top_p, seed, row_ids, step)


_z_select = torch.library.custom_op("ztok::z_select", _kernel, mutates_args=())
_registered = torch.ops.ztok.z_select.default


@_z_select.register_fake
def _(hidden, rows, temperature, top_p, seed, row_ids, step):
    num_rows = hidden.shape[0]
    return hidden.new_empty(num_rows, dtype=torch.int32), hidden.new_empty(num_rows, dtype=torch.float32)


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
        A `Selection`. Not differentiable: a backward through it raises. A row of which any logit is NaN or infinite
        gets code 0 and log-probability NaN.

    Raises:
        ValueError: wrong rank, dtype, device or size, no codes, or a number out of its range.
    """
    checks.check_tensor(OP, "hidden", hidden, "[B, D]")
    checks.check_tensor(OP, "rows", rows, "[V, D]")
    checks.check_not_empty(OP, "rows", rows)
    checks.check_size(OP, "rows", rows, 1, hidden.shape[1], "width of hidden")
    checks.check_same_device(OP, "rows", rows, "hidden", hidden)
    if rows.dtype != hidden.dtype:
        checks.fail(OP, "rows", f"of the dtype of hidden ({hidden.dtype})", checks.describe(rows))
    if not _is_number(temperature) or not 0 <= temperature < math.inf:
        checks.fail(OP, "temperature", "a finite number of at least 0", repr(temperature))
    if not _is_number(top_p) or not 0 < top_p <= 1:
        checks.fail(OP, "top_p", "a number in (0, 1]", repr(top_p))
    _check_integer("seed", seed, 63)
    _check_integer("step", step, 32)
    if row_ids is not None:
        checks.check_tensor(OP, "row_ids", row_ids, "[B]", (torch.int64,))
        checks.check_size(OP, "row_ids", row_ids, 0, hidden.shape[0], "rows of hidden")
        checks.check_same_device(OP, "row_ids", row_ids, "hidden", hidden)
    sampling = float(temperature), float(top_p), seed, row_ids, step
    return Selection(*dispatch.run(_registered, _kernel, hidden, rows, *sampling))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_integer(argument: str, value: object, bits: int) -> None:
    checks.check_count(OP, argument, value)
    if value >= 2**bits:
        checks.fail(OP, argument, f"below 2**{bits}", value)
