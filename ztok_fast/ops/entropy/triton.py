"""Triton backend of `token_intervals`: one program per row, two passes over its logits.

Only exp must have the same bits everywhere; what follows is integers. `tl.fma` rounds once, and no other product is
added to anything, so nothing is left that a compiler could fuse; fusion is forbidden all the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ztok_fast.ops.triton_arithmetic import exp

BLOCK, WARPS = 1024, 4


@triton.jit
def count_of(x):
    """int64: 1 + rint(exp(x) * 2^30) for x <= 0."""
    weight = exp(x) * 1073741824.0
    # Adding 2^23 rounds to an integer, ties to even; what is not below 2^23 is one.
    rounded = tl.where(weight < 8388608.0, (weight + 8388608.0) - 8388608.0, weight)
    return rounded.to(tl.int32).to(tl.int64) + 1


@triton.jit(do_not_specialize=["V"])
def token_intervals_kernel(logits, targets, starts, sizes, totals, V, BV: tl.constexpr):
    """Grid: rows. A row that is not finite gets 0, 0, 0."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    largest = tl.full([BV], float("-inf"), tl.float32)
    bad = tl.zeros([BV], tl.int32)
    for first in range(0, V, BV):
        token = first + tl.arange(0, BV)
        x = tl.load(logits + row * V + token, mask=token < V, other=float("-inf"))
        bad += ((token < V) & ((tl.abs(x) < float("inf")) == 0)).to(tl.int32)
        largest = tl.where(x > largest, x, largest)
    top = tl.max(largest, 0)
    finite = tl.sum(bad, 0) == 0
    start = tl.zeros([BV], tl.int64)
    size = tl.zeros([BV], tl.int64)
    total = tl.zeros([BV], tl.int64)
    for first in range(0, V, BV):
        token = first + tl.arange(0, BV)
        x = tl.load(logits + row * V + token, mask=token < V, other=float("-inf"))
        count = tl.where((token < V) & finite, count_of(x - top), 0)
        start += tl.where(token < target, count, 0)
        size += tl.where(token == target, count, 0)
        total += count
    tl.store(starts + row, tl.sum(start, 0))
    tl.store(sizes + row, tl.sum(size, 0))
    tl.store(totals + row, tl.sum(total, 0))


def token_intervals(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `ztok_fast.ops.token_intervals`. The logits are read twice, the second time from the cache."""
    start, size, total = (torch.empty_like(targets) for _ in range(3))
    if targets.numel():
        token_intervals_kernel[(targets.shape[0],)](
            logits, targets, start, size, total, logits.shape[1],
            BV=min(BLOCK, triton.next_power_of_2(logits.shape[1])), num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return start, size, total
