"""The sampling rule of docs/determinism.md in plain PyTorch, for logits on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops import arithmetic
from ztok_fast.ops.zhead.philox import MASK_32, philox_4x32, split_64


class NoToken(ValueError):
    """A row of logits has no token, because one is NaN or the greatest is not finite."""

    def __init__(self, row: int) -> None:
        super().__init__(f"engine: row {row}: expected finite logits, got NaN or infinity")
        self.row = row


def check_tokens(tokens: Tensor) -> Tensor:
    """The tokens that a head has chosen, none of which may be -1: it gives that to rows that have no token."""
    if tokens.numel() and int(tokens.min()) < 0:
        raise NoToken(int((tokens < 0).nonzero()[0]))
    return tokens


def greatest(logits: Tensor) -> Tensor:
    """The first of the greatest logits of each row [r, V]; int64 [r] on the CPU, -1 in a row that has no token."""
    values, tokens = logits.max(-1)
    return tokens.masked_fill(~values.isfinite(), -1).cpu()


def random_bits(seed: int, row_ids: Tensor, steps: Tensor) -> list[int]:
    """The 64 random bits of each draw."""
    counter = torch.zeros_like(row_ids), row_ids & MASK_32, (row_ids >> 32) & MASK_32, steps & MASK_32
    low, high, _, _ = philox_4x32(counter, split_64(seed))
    return [a | b << 32 for a, b in zip(low.tolist(), high.tolist())]


def draw(logits: Tensor, temperature: float, top_p: float, seed: int, row_ids: Tensor, steps: Tensor) -> Tensor:
    """A token for each row of logits [r, V], -1 in a row that has none; int64 [r] on the CPU.

    `row_ids` and `steps` are on the CPU.
    """
    if not len(logits):
        return torch.empty(0, dtype=torch.int64)
    # a tensor, because division by a number may be a product with its reciprocal on GPUs
    z = logits / torch.full_like(logits, temperature)
    finite = z.amax(-1, keepdim=True).isfinite()
    z = torch.where(finite, z, 0)
    weights = (arithmetic.exp(z - z.amax(-1, keepdim=True)).double() * 2.0**30).round().long()
    weights, order = weights.sort(dim=-1, descending=True, stable=True)
    sums = weights.cumsum(-1)
    kept = (sums.double() < top_p * sums[:, -1:].double()).sum(-1, keepdim=True)
    totals = sums.gather(-1, kept)[:, 0].tolist()
    bits = random_bits(seed, row_ids, steps)
    places = torch.tensor([u * total >> 64 for u, total in zip(bits, totals)], device=logits.device)
    chosen = (sums <= places[:, None]).sum(-1, keepdim=True)
    return torch.where(finite, order.gather(-1, chosen), -1)[:, 0].cpu()
