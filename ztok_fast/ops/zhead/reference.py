"""Plain PyTorch version of the Z head: the next Z-token from the Z rows alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops.zhead.philox import philox_4x32, split_64


def z_logits(hidden: Tensor, rows: Tensor) -> Tensor:
    """Return fp32 (float64 for float64 input) logits `[B, V]`, the same for a row whatever else is in the batch.

    A matrix product orders its sums by the shape of the whole batch. Summing in float64 and rounding once makes that
    order invisible in fp32, and gives equal rows of the codebook equal logits, so that ties are ties.
    """
    logits = hidden.double() @ rows.double().T
    return logits if hidden.dtype == torch.float64 else logits.float()


def gumbel_noise(num_codes: int, row_ids: Tensor, seed: int, step: int) -> Tensor:
    """Return standard Gumbel noise, float64 `[B, V]`, a function of (seed, row id, step, code) alone.

    The counter is (code // 4, row id low, row id high, step), the key is the seed, and code takes word `code % 4`
    of the four. With w = (word + 1/2) / 2³² the noise is -log(-log1p(-w)): the large values, which decide the draw,
    come from small w, where w is fine-grained in floating point.
    """
    blocks = torch.arange((num_codes + 3) // 4, device=row_ids.device)
    counter = (blocks, *split_64(row_ids[:, None]), torch.full_like(blocks, step))
    words = torch.stack(philox_4x32(counter, split_64(seed)), dim=-1)  # [B, blocks, 4]
    uniform = (words.flatten(1)[:, :num_codes].double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def nucleus_mask(scores: Tensor, top_p: float) -> Tensor:
    """Return bool `[B, V]`: the smallest set of codes whose probability reaches `top_p`."""
    ordered, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
    # A code stays while the codes before it have not reached top_p, so the first always stays.
    before = torch.nn.functional.pad(ordered[:, :-1].cumsum(-1), (1, 0))
    stays = before < top_p
    return torch.zeros_like(stays).scatter(-1, order, stays)


def z_select(hidden, rows, temperature, top_p, seed, row_ids, step) -> tuple[Tensor, Tensor]:
    """See `ztok_fast.ops.z_select`; returns codes and log-probabilities."""
    logits = z_logits(hidden, rows)
    if temperature == 0:
        scores = logits
    else:
        scores = logits.double() / temperature
        allowed = nucleus_mask(scores, top_p) if top_p < 1 else None
        if row_ids is None:
            row_ids = torch.arange(hidden.shape[0], device=hidden.device)
        scores = scores + gumbel_noise(rows.shape[0], row_ids, seed, step)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
    finite = logits.isfinite().all(-1)
    codes = scores.argmax(-1).masked_fill(~finite, 0)  # the first of several maxima
    log_probs = logits.double().log_softmax(-1).gather(-1, codes[:, None])[:, 0]
    return codes.int(), log_probs.masked_fill(~finite, torch.nan).float()
