"""Triton backend of `token_scores`: one kernel makes logits tile by tile and keeps four numbers per token and part of
the vocabulary; a few small torch ops merge the parts. No logits are written and nothing waits for the host."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ztok_fast.ops.backends import triton_is_interpreted
from ztok_fast.ops.nearest.triton_scan import load_codes
from ztok_fast.ops.triton_launch import Tiles, parts_of

# programs that fill a GPU, and the parts that the vocabulary is cut into for it at most
FULL_GRID, MOST_PARTS = 264, 64


@triton.jit
def own_logit(hidden, rows, token, target, T, D: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """float64 logits [BT] of the tokens' own targets; 0 without one."""
    own = tl.zeros([BT], tl.float64)
    here = (token < T) & (target >= 0)
    for step in range(0, tl.cdiv(D, BK)):
        k = step * BK + tl.arange(0, BK)
        mask = here[:, None] & (k < D)[None, :]
        h = tl.load(hidden + token[:, None] * D + k[None, :], mask=mask, other=0.0).to(tl.float64)
        r = tl.load(rows + target[:, None] * D + k[None, :], mask=mask, other=0.0).to(tl.float64)
        own += tl.sum(h * r, 1)
    return own


@triton.jit(do_not_specialize=["T", "V", "tiles", "parts"])
def token_scores_kernel(
    hidden, rows, targets, own, sums, ranks, T, V, tiles, parts,
    D: tl.constexpr, UPCAST: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of codes for BT tokens. Grid: blocks of tokens, parts of the codes.

    Writes `own` float64 [T], the target's logit; `sums` float32 [3, T, parts], the greatest logit (NaN if one is not
    finite), the sum of exp(logit - greatest), and the target's logit as the tiles have it (0 in other parts); `ranks`
    int32 [T, parts], how many codes of the part come before the target.
    """
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    part = tl.program_id(1)
    target = tl.load(targets + token, mask=token < T, other=-1)
    exact = own_logit(hidden, rows, token, target, T, D, BT, BO)
    mine = exact.to(tl.float32)
    greatest = tl.full([BT], float("-inf"), tl.float32)
    total = tl.zeros([BT], tl.float32)
    rounded = tl.zeros([BT], tl.float32)
    rank = tl.zeros([BT], tl.int32)
    bad = tl.zeros([BT], tl.int32)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(V, BV))):
        codes = tile * BV + tl.arange(0, BV)
        acc = tl.zeros([BT, BV], tl.float32)
        for step in range(0, tl.cdiv(D, BK)):
            k = step * BK + tl.arange(0, BK)
            h = load_codes(hidden, token, k, T, D, UPCAST)
            r = load_codes(rows, codes, k, V, D, UPCAST)
            acc = tl.dot(h, tl.trans(r), acc, input_precision="ieee")
        inside = (codes < V)[None, :]
        is_target = codes[None, :] == target[:, None]
        before = (acc > mine[:, None]) | ((acc == mine[:, None]) & (codes[None, :] < target[:, None]))
        rank += tl.sum((inside & before & (is_target == 0)).to(tl.int32), 1)
        rounded += tl.sum(tl.where(is_target, acc, 0.0), 1)
        bad += tl.sum((inside & ((tl.abs(acc) < float("inf")) == 0)).to(tl.int32), 1)
        logits = tl.where(inside, acc, float("-inf"))
        higher = tl.maximum(greatest, tl.max(logits, 1))
        # an infinite logit ends as NaN whatever this gives
        total = total * tl.exp(greatest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        greatest = higher
    keep = token < T
    at = token * parts + part
    plane = T.to(tl.int64) * parts
    if part == 0:
        tl.store(own + token, exact, mask=keep)
    tl.store(sums + at, tl.where(bad > 0, float("nan"), greatest), mask=keep)
    tl.store(sums + plane + at, total, mask=keep)
    tl.store(sums + 2 * plane + at, rounded, mask=keep)
    tl.store(ranks + at, rank, mask=keep)


# BO: elements at a time of the float64 product
_tiles = functools.partial(Tiles, token_scores_kernel, "BT BV BK BO", key=("D",))
TILES = _tiles((64, 128, 32, 16, 8, 3), (64, 128, 64, 16, 8, 3), (64, 128, 32, 16, 8, 4))
# float32 is multiplied without tensor cores, in registers
TILES_FLOAT32 = _tiles((32, 32, 32, 16, 4))


def token_scores(hidden: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """See `ztok_fast.ops.token_scores`. A logit whose partial sums overflow float32 counts as infinite.

    Work: the rows are read once per 64 tokens (32 of float32). Extra memory: four numbers per token and part.
    """
    total, width = hidden.shape
    size = rows.shape[0]
    if total == 0:
        return hidden.new_empty(0, dtype=torch.float32), hidden.new_empty(0, dtype=torch.int32)
    tiles = TILES_FLOAT32 if hidden.dtype == torch.float32 else TILES
    blocks, count = triton.cdiv(total, tiles.BT), triton.cdiv(size, tiles.BV)
    parts, per_part = parts_of(count, blocks, FULL_GRID, MOST_PARTS)
    own = torch.empty(total, dtype=torch.float64, device=hidden.device)
    sums = torch.empty((3, total, parts), dtype=torch.float32, device=hidden.device)
    ranks = torch.empty((total, parts), dtype=torch.int32, device=hidden.device)
    tiles[blocks, parts](
        hidden, rows, targets, own, sums, ranks, total, size, per_part, parts,
        D=width, UPCAST=triton_is_interpreted(),
    )  # fmt: skip
    greatest, mass, rounded = sums.double()
    largest = greatest.amax(1)  # of NaN and a number it is NaN
    # The target takes part with its exact logit: where it has most of the mass, its error would be the result's.
    exact = (own - largest).exp()
    mass = (mass * (greatest - largest[:, None]).exp()).sum(1) + exact - (rounded.sum(1) - largest).exp()
    bits = (largest + torch.maximum(mass, exact).log() - own) / math.log(2)
    asked = targets >= 0
    surprisal = torch.where(asked, bits, 0).float()
    return surprisal, torch.where(asked & largest.isfinite(), ranks.sum(1), -1).int()
