"""The pieces of a pass on a GPU: what to launch. docs/determinism.md says what they compute.

Nothing waits for the host.

`slots` and `seen` are int64 [R]: where a row's sequence is in the arenas, and how many keys the row sees, its own
included. A row that sees none is padding. Arenas are those of one layer, float16 or float32: keys
[slots, KV, C / 16, d, 16], values [slots, KV, C, d].
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ztok_fast.engine.triton_kernels import (
    angles_kernel,
    norm_kernel,
    rotate_kernel,
    scores_kernel,
    silu_kernel,
    softmax_kernel,
    values_kernel,
)
from ztok_fast.ops.triton_launch import Tiles

NORM = Tiles(norm_kernel, "BK", (512, 2), fusion=False)
ANGLES = Tiles(angles_kernel, "", (1,), fusion=False)
ROTATE = Tiles(rotate_kernel, "", (1,), fusion=False)
SCORES = Tiles(scores_kernel, "BN", (128, 4), fusion=False)
SOFTMAX = Tiles(softmax_kernel, "BN", (256, 2), fusion=False)
VALUES = Tiles(values_kernel, "", (4,), fusion=False)
SILU = Tiles(silu_kernel, "BK", (512, 4), fusion=False)

SCORES_AT_ONCE = 1 << 25
"""Scores in memory at the same time, 128 MiB of them; with more, the rows of a pass attend in turn."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float32 [R, D]."""
    y = torch.empty_like(x)
    NORM[(x.shape[0],)](x, weight, y, x.shape[1], eps)
    return y


def rotary_angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Sines and cosines, float32 [R, d / 2] each."""
    half = frequencies.shape[0]
    sines, cosines = (frequencies.new_empty(positions.shape[0], half) for _ in range(2))
    ANGLES[(positions.shape[0],)](positions, frequencies, sines, cosines, half, BH=triton.next_power_of_2(half))
    return sines, cosines


def rotate(
    qkv: Tensor, norms: Tensor | None, angles: tuple[Tensor, Tensor], slots: Tensor, seen: Tensor, keys: Tensor,
    values: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Rotated queries, [R, H, d]. Rotated keys, and values, go into the arenas.

    Args:
        qkv: [R, (H + 2 KV) d].
        norms: [2, d], weights of the norms of queries and keys, or None.
        angles: of `rotary_angles`.
    """
    _, kv_heads, capacity, d = values.shape
    rows, heads = qkv.shape[0], qkv.shape[1] // d - 2 * kv_heads
    queries = qkv.new_empty(rows, heads, d)
    ROTATE[rows, heads + 2 * kv_heads](
        qkv, norms, *angles, slots, seen, queries, keys, values, heads, kv_heads, capacity, eps,
        d=d, BH=triton.next_power_of_2(d // 2),
    )  # fmt: skip
    return queries


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor, seen: Tensor, longest: int, scale: float
) -> Tensor:
    """Queries [R, H, d] over the keys and values that they see; [R, H d]. `longest`: the most that one may see."""
    rows, heads, d = queries.shape
    kv_heads, capacity = values.shape[1:3]
    group, width = heads // kv_heads, -(-longest // 16) * 16
    y = queries.new_empty(rows, heads * d)
    at_once = max(1, min(rows, SCORES_AT_ONCE // (heads * width)))
    scores = queries.new_empty(at_once, heads, width)
    for first in range(0, rows, at_once):
        some = slice(first, first + at_once)
        q, at, n, count = queries[some], slots[some], seen[some], min(at_once, rows - first)
        SCORES[count, kv_heads, triton.cdiv(width, SCORES.BN)](
            q, keys, at, n, scores, kv_heads, capacity, width, scale,
            d=d, G=group, BG=triton.next_power_of_2(group),
        )  # fmt: skip
        SOFTMAX[count, heads](scores, n, heads, width)
        VALUES[count, heads](
            scores, values, at, n, y[some], heads, kv_heads, capacity, width, d=d, BD=triton.next_power_of_2(d)
        )
    return y


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [R, I], of [R, 2 I], in which 16 gates and 16 ups alternate."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, width)
    SILU[rows, triton.cdiv(width, SILU.BK)](gate_up, y, width)
    return y
