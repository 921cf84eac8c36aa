"""Triton backward passes of the residual search: gradients of rows and codebooks, the codes held fixed.

With r_l the residual that level l searches, c_l its code and w_l the gradient of its distance, what flows to r_l is
G_l = G_{l+1} + w_l dD/dr_l, and what flows to c_l is w_l dD/dc_l - G_{l+1}, because r_{l+1} = r_l - c_l. A first kernel
makes both for every row and level, float32 [L, M, d]; the second is then summed by code.

The sum by code is deterministic and never waits for the host: (level, code) pairs are sorted (a stable sort), every
run of equal pairs is cut into pieces of at most PIECE rows, one program adds the rows of a piece in order, and another
the pieces of a code. No code is so popular that one program has more than PIECE rows and M L / PIECE pieces to add.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ztok_fast.ops.nearest.triton_scan import finish_score, load_codes, load_rows, term_of
from ztok_fast.ops.triton_launch import Tiles

# rows that one program adds up: it divides the sum, so it is the same everywhere and not tuned
PIECE = 64


@triton.jit
def residual_of(x, rows, k, book, codes, M, V, L, level, D: tl.constexpr):
    """What the levels before `level` leave over of x [BM, BK], float32. Rows with code -1 lose nothing."""
    left = load_rows(x, rows, k, M, D, 2, True)
    for before in range(0, level):
        left -= code_of(book, codes, rows, k, M, V, L, before, D)
    return left


@triton.jit
def code_of(book, codes, rows, k, M, V, L, level, D: tl.constexpr):
    """The code of a level [BM, BK], float32; zeros where there is none."""
    code = tl.load(codes + rows.to(tl.int64) * L + level, mask=rows < M, other=-1)
    return load_codes(book + V.to(tl.int64) * D * level, tl.where(code < 0, V, code), k, V, D, True)


@triton.jit
def store_as(pointer, at, value, mask):
    """Round to the type of the pointer; the interpreter's cast to bfloat16 cuts off."""
    if pointer.dtype.element_ty == tl.bfloat16:
        value = tl.where(tl.abs(value) < float("inf"), term_of(value), value)
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "V", "L"])
def cosine_parts_kernel(
    x, book, codes, parts, M, V, L, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """|r|, |c| and cos(r, c) of every row and level, float32 [3, L, M]. Grid: blocks of rows, levels."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    level = tl.program_id(1)
    dot, r_square, c_square = (tl.zeros([BM], tl.float64), tl.zeros([BM], tl.float64), tl.zeros([BM], tl.float64))
    for start in range(0, tl.cdiv(D, BK)):
        k = start * BK + tl.arange(0, BK)
        r = residual_of(x, rows, k, book, codes, M, V, L, level, D).to(tl.float64)
        c = code_of(book, codes, rows, k, M, V, L, level, D).to(tl.float64)
        dot += tl.sum(r * c, 1)
        r_square += tl.sum(r * r, 1)
        c_square += tl.sum(c * c, 1)
    plane = L.to(tl.int64) * M
    at = M.to(tl.int64) * level + rows
    tl.store(parts + at, tl.sqrt(r_square).to(tl.float32), mask=rows < M)
    tl.store(parts + plane + at, tl.sqrt(c_square).to(tl.float32), mask=rows < M)
    cosine = finish_score(dot, r_square, c_square, "cosine")
    tl.store(parts + 2 * plane + at, cosine.to(tl.float32), mask=rows < M)


@triton.jit(do_not_specialize=["M", "V", "L"])
def row_gradients_kernel(
    x, book, codes, weights, parts, add, factor, grad_x, to_codes, M, V, L,
    D: tl.constexpr, METRIC: tl.constexpr, QUANTIZE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What flows to the rows [M, D] and, per level, to their codes [L, M, D]. Grid: blocks of rows, stretches of width.

    With QUANTIZE the weights of the used levels are 1/2, the sum that reaches x is multiplied by the number `factor`,
    and `add` is added to it in rows that use any level. `parts` is from `cosine_parts_kernel`.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    mask = (rows < M)[:, None] & (k < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + k[None, :]
    flow = tl.zeros([BM, BK], tl.float32)
    any_level = tl.zeros([BM], tl.int32)
    for step in range(0, L):
        level = L - 1 - step
        r = residual_of(x, rows, k, book, codes, M, V, L, level, D)
        c = code_of(book, codes, rows, k, M, V, L, level, D)
        if QUANTIZE:
            used = tl.load(codes + rows.to(tl.int64) * L + level, mask=rows < M, other=-1) >= 0
            any_level = any_level | used.to(tl.int32)
            flow += tl.where(used[:, None], r - c, 0.0)
            to_code = -flow
        else:
            w = tl.load(weights + rows.to(tl.int64) * L + level, mask=rows < M, other=0.0).to(tl.float32)[:, None]
            if METRIC == "l2":
                flow += 2 * w * (r - c)
                to_code = -flow
            elif METRIC == "dot":
                to_code = -w * r - flow
                flow -= w * c
            else:
                part = parts + M.to(tl.int64) * level + rows
                plane = M.to(tl.int64) * L
                r_norm = tl.load(part, mask=rows < M, other=0.0)[:, None]
                c_norm = tl.load(part + plane, mask=rows < M, other=0.0)[:, None]
                cosine = tl.load(part + 2 * plane, mask=rows < M, other=0.0)[:, None]
                has_r, has_c = r_norm > 0, c_norm > 0
                r_inverse = tl.where(has_r, 1 / tl.where(has_r, r_norm, 1.0), 0.0)
                c_inverse = tl.where(has_c, 1 / tl.where(has_c, c_norm, 1.0), 0.0)
                a, b = r * r_inverse, c * c_inverse
                to_code = w * (cosine * b - a) * c_inverse - flow
                flow += w * (cosine * a - b) * r_inverse
        tl.store(to_codes + M.to(tl.int64) * D * level + at, to_code, mask=mask)
    if QUANTIZE:
        straight = tl.load(add + at, mask=mask, other=0.0).to(tl.float32)
        flow = flow * tl.load(factor) + tl.where((any_level > 0)[:, None], straight, 0.0)
    store_as(grad_x, at, flow, mask)


@triton.jit(do_not_specialize=["runs"])
def sum_piece_kernel(
    values, order, starts, first_piece, run_of_piece, sums, runs,
    D: tl.constexpr, PIECE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One piece of a run: sums [pieces, D] of the rows `order[start : end]` of values, in their order."""
    piece = tl.program_id(0)
    run = tl.load(run_of_piece + piece)
    if run < runs:
        k = tl.program_id(1) * BK + tl.arange(0, BK)
        first = tl.load(starts + run) + (piece - tl.load(first_piece + run)) * PIECE
        end = tl.minimum(first + PIECE, tl.load(starts + run + 1))
        total = tl.zeros([BK], tl.float32)
        for step in tl.static_range(PIECE // BM):
            at = first + step * BM + tl.arange(0, BM)
            row = tl.load(order + at, mask=at < end, other=0)
            mask = (at < end)[:, None] & (k < D)[None, :]
            total += tl.sum(tl.load(values + row[:, None] * D + k[None, :], mask=mask, other=0.0), 0)
        tl.store(sums + piece.to(tl.int64) * D + k, total, mask=k < D)


@triton.jit
def sum_run_kernel(sums, first_piece, factor, grad, D: tl.constexpr, FACTOR: tl.constexpr, BK: tl.constexpr):
    """The pieces of one code, in their order, times `factor` if there is one. Grid: codes, stretches of the width."""
    run = tl.program_id(0)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    first = tl.load(first_piece + run)
    total = tl.zeros([BK], tl.float32)
    for piece in range(0, tl.load(first_piece + run + 1) - first):
        total += tl.load(sums + (first + piece) * D + k, mask=k < D, other=0.0)
    if FACTOR:
        total *= tl.load(factor)
    store_as(grad, run.to(tl.int64) * D + k, total, k < D)


_PARTS, _ROWS, _PIECES = (
    Tiles(kernel, "BM BK", (16, 64, 4)) for kernel in (cosine_parts_kernel, row_gradients_kernel, sum_piece_kernel)
)
_RUNS = Tiles(sum_run_kernel, "BK", (64, 4))


def sum_by_code(values: Tensor, codes: Tensor, codebook: Tensor, factor: Tensor | None) -> Tensor:
    """Sums of rows float32 [L, M, d] by their codes [M, L] (-1: none), shaped and typed as the codebook [L, V, d].

    The work is that of the sort and of reading the values once; extra memory (L V + L M / PIECE) d numbers.
    """
    levels, size, width = codebook.shape
    grad = torch.empty_like(codebook)
    runs = levels * size
    of_level = torch.arange(levels, device=codes.device)[:, None] * size
    run = torch.where(codes.T >= 0, codes.T + of_level, runs).flatten()
    run, order = torch.sort(run, stable=True)
    starts = torch.searchsorted(run, torch.arange(runs + 1, device=run.device))
    pieces = torch.diff(starts).add_(PIECE - 1).div_(PIECE, rounding_mode="floor")
    first_piece = torch.cat([pieces.new_zeros(1), torch.cumsum(pieces, 0)])
    most = min(runs, run.shape[0]) + triton.cdiv(run.shape[0], PIECE)
    run_of_piece = torch.searchsorted(first_piece[1:], torch.arange(most, device=run.device), right=True)
    step = triton.next_power_of_2(width)
    tiles = _PIECES.at_most(BK=step)
    sums = torch.empty((most, width), dtype=torch.float32, device=values.device)
    if most > 0:
        tiles[most, triton.cdiv(width, tiles.BK)](
            values, order, starts, first_piece, run_of_piece, sums, runs, D=width, PIECE=PIECE
        )
    tiles = _RUNS.at_most(BK=step)
    tiles[runs, triton.cdiv(width, tiles.BK)](sums, first_piece, factor, grad, D=width, FACTOR=factor is not None)
    return grad


def row_gradients(x, codebook, codes, weights, metric, add=None, factor=None) -> tuple[Tensor, Tensor]:
    """Gradient of the rows, and float32 [L, M, d] what flows to their codes; see `row_gradients_kernel`."""
    rows, width = x.shape
    levels, size, _ = codebook.shape
    grad_x = torch.empty_like(x)
    to_codes = torch.empty((levels, rows, width), dtype=torch.float32, device=x.device)
    if rows == 0:
        return grad_x, to_codes
    step = triton.next_power_of_2(width)
    parts = None
    if metric == "cosine":
        parts = torch.empty((3, levels, rows), dtype=torch.float32, device=x.device)
        tiles = _PARTS.at_most(BK=step)
        tiles[triton.cdiv(rows, tiles.BM), levels](x, codebook, codes, parts, rows, size, levels, D=width)
    tiles = _ROWS.at_most(BK=step)
    tiles[triton.cdiv(rows, tiles.BM), triton.cdiv(width, tiles.BK)](
        x, codebook, codes, weights, parts, add, factor, grad_x, to_codes, rows, size, levels,
        D=width, METRIC=metric, QUANTIZE=weights is None,
    )  # fmt: skip
    return grad_x, to_codes


def codebook_assign_backward(
    x: Tensor, codebook: Tensor, codes: Tensor, grad_distances: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` [M, d] and `codebook` [L, V, d] from that of the distances [M, L], the codes held fixed."""
    grad_x, to_codes = row_gradients(x, codebook, codes, grad_distances, metric)
    return grad_x, sum_by_code(to_codes, codes, codebook, None)
