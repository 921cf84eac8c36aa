"""Triton backend of the nearest-code search: host side. The kernels are in `triton_kernels.py`.

Extra memory: per level and code one float32, per row two codes and three scores for each part that the codebook is
split into (at most 32), a float32 copy of the rows if there are several levels, and for float16 and float32 codebooks
one copy of the codebook in bfloat16 terms. Never rows x codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ztok_fast.ops.backends import triton_is_interpreted
from ztok_fast.ops.nearest import triton_kernels as kernels
from ztok_fast.ops.nearest.triton_bound import error_bound
from ztok_fast.ops.triton_launch import Tiles, parts_of

# fewer blocks of rows than this leave multiprocessors idle: the codebook is split until there are about as many
FULL_BLOCKS = 128
MOST_PARTS = 32

_KEY = ("D", "METRIC", "ROW_TERMS", "CODE_TERMS", "LEVELS", "QUANTIZE")


def _search_tiles(BK: int, *tiles: tuple[int, int, int, int, int]) -> Tiles:
    rows = [(BM, BN, BD, 64, BK, warps, stages) for BM, BN, BD, warps, stages in tiles]
    names = "BM BN BD BV BK"
    return Tiles(kernels.residual_search_kernel, names, *rows, key=_KEY, writes=("residual",), adds=("usage",))


PREPARE = Tiles(kernels.prepare_codes_kernel, "BV BK", (32, 64, 4))
# one tile covers rows of up to LANES numbers; wider ones, and codes of two terms, which would spill, go in steps
LANES = 64
SEARCH_LANES = _search_tiles(8, (64, 32, 64, 8, 2), (64, 64, 64, 8, 2), (64, 32, 64, 4, 2))
SEARCH = _search_tiles(16, (128, 64, 32, 8, 3), (128, 128, 32, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 8, 3))
_SCANS = (64, 64, 32, 4, 3), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 64, 32, 8, 3)
SCAN = Tiles(kernels.scan_kernel, "BM BN BK", *_SCANS, key=_KEY[:-1])
RERANK = Tiles(kernels.rerank_kernel, "BM BK BV", (16, 64, 32, 4), maxnreg=128)
SUM_CODES = Tiles(kernels.sum_codes_kernel, "BM BK", (16, 64, 4), maxnreg=128)
MEAN_ERROR = Tiles(kernels.mean_error_kernel, "BP", (1024, 4))


class Codes(NamedTuple):
    """Codebooks as the scan reads them: `terms` is the codebooks themselves where they are exact in one term."""

    terms: Tensor  # [T, L, V, d]
    offsets: Tensor  # float32 [L, V]
    longest: Tensor  # int32 [L], bits of a float32
    row_terms: int
    code_terms: int


class Found(NamedTuple):
    """What a search writes."""

    codes: Tensor  # int32 [M, L]
    distances: Tensor  # float32 [M, L]
    usage: Tensor | None  # int64 [L, V]
    quantized: Tensor | None  # [M, d] in the dtype of the rows
    commitment: Tensor | None  # float32 [], the mean error over pairs of row and used level, and over the width
    codebook_loss: Tensor | None  # the same once more


def prepare_codes(x: Tensor, codebook: Tensor, metric: str, levels: int) -> Codes:
    """One pass over the codebooks [L, V, d] for offsets, terms and greatest lengths."""
    num_levels, size, width = codebook.shape
    native = levels == 1 and x.dtype == codebook.dtype and x.dtype in (torch.float16, torch.bfloat16)
    row_terms = 1 if native else 2
    code_terms = 1 if native or codebook.dtype == torch.bfloat16 else 2
    offsets = torch.empty((num_levels, size), dtype=torch.float32, device=x.device)
    longest = torch.zeros(num_levels, dtype=torch.int32, device=x.device)
    terms = codebook
    if code_terms == 2:
        term_dtype = torch.float32 if triton_is_interpreted() else torch.bfloat16
        terms = torch.empty((2, *codebook.shape), dtype=term_dtype, device=x.device)
    tiles = PREPARE.at_most(BK=triton.next_power_of_2(width))
    tiles[triton.cdiv(size, tiles.BV), num_levels](
        codebook, terms, offsets, longest, size, D=width, METRIC=metric, CODE_TERMS=code_terms
    )
    return Codes(terms, offsets, longest, row_terms, code_terms)


def search(x: Tensor, codebook: Tensor, metric: str, row_levels: Tensor | None, quantize: bool) -> Found:
    """Residual search of the rows [M, d] in the codebooks [L, V, d].

    Args:
        x, codebook: float16, bfloat16 or float32, contiguous.
        row_levels: integers [M], levels that each row uses, or None for all.
        quantize: also make usage counts and the sum of the chosen codes.
    """
    rows, width = x.shape
    levels, size, _ = codebook.shape
    codes = torch.empty((rows, levels), dtype=torch.int32, device=x.device)
    distances = torch.empty((rows, levels), dtype=torch.float32, device=x.device)
    usage = torch.zeros((levels, size), dtype=torch.int64, device=x.device) if quantize else None
    quantized = torch.empty_like(x) if quantize else None
    new = torch.empty if rows else torch.zeros  # without rows nothing below writes them
    losses = [new((), dtype=torch.float32, device=x.device) for _ in range(2)] if quantize else (None, None)
    found = Found(codes, distances, usage, quantized, *losses)
    if rows == 0:
        return found
    prepared = prepare_codes(x, codebook, metric, levels)
    # the first level leaves its residual in a copy, which is then the row that the others search
    source = x if levels == 1 else x.float() if x.dtype != torch.float32 else x.clone()
    bound = error_bound(width, prepared.row_terms, prepared.code_terms)
    step = max(16, triton.next_power_of_2(width))
    lanes = width <= LANES and prepared.code_terms == 1
    tiles = (SEARCH_LANES if lanes else SEARCH).at_most(BK=step)
    fills_device = triton.cdiv(rows, tiles.BM) >= FULL_BLOCKS
    if not fills_device:
        tiles = RERANK.at_most(BK=step)
    blocks = triton.cdiv(rows, tiles.BM)
    # where every block of rows leaves its part of the loss at each level
    sums = torch.empty((2, levels, blocks), dtype=torch.float64, device=x.device) if quantize else None
    if fills_device:  # all levels in one launch
        tiles[(blocks,)](
            source, codebook, prepared.terms, prepared.offsets, prepared.longest, row_levels, source,
            codes, distances, usage, quantized, sums, rows, size, levels,
            BOUND=bound, D=width, METRIC=metric, ROW_TERMS=prepared.row_terms, CODE_TERMS=prepared.code_terms,
            UPCAST=triton_is_interpreted(), LEVELS=row_levels is not None, QUANTIZE=quantize, LANES=lanes,
        )  # fmt: skip
    else:
        _by_level(source, codebook, prepared, metric, row_levels, found, sums, bound, tiles)
    if quantize:
        MEAN_ERROR[(1,)](sums, *losses, levels * blocks, D=width)
    return found


def _part_scores(parts: int, source: Tensor) -> tuple[Tensor, Tensor]:
    """What `scan_kernel` leaves; of rows that use no level nothing is written or read."""
    rows = source.shape[0]
    scores = torch.empty((parts, 3, rows), dtype=torch.float32, device=source.device)
    return scores, torch.empty((parts, 2, rows), dtype=torch.int32, device=source.device)


def _by_level(source, codebook, prepared, metric, row_levels, found, sums, bound, rerank):
    """Two launches per level (and one for the sum of the codes), for so few rows that the codebook has to be split over
    the device to fill it."""
    rows, width = source.shape
    levels, size, _ = codebook.shape
    blocks, tiles = triton.cdiv(rows, SCAN.BM), triton.cdiv(size, SCAN.BN)
    parts, tiles_per_part = parts_of(tiles, blocks, FULL_BLOCKS, MOST_PARTS)
    scores, indices = _part_scores(parts, source)
    options = {"D": width, "METRIC": metric, "LEVELS": row_levels is not None}
    grid = (triton.cdiv(rows, rerank.BM),)
    for level in range(levels):
        SCAN[blocks, parts](
            source, prepared.terms[..., level, :, :] if prepared.code_terms == 1 else prepared.terms[0, level],
            prepared.terms[1, level] if prepared.code_terms == 2 else None,
            prepared.offsets[level], row_levels, scores, indices, rows, size, tiles_per_part, level,
            ROW_TERMS=prepared.row_terms, CODE_TERMS=prepared.code_terms, UPCAST=triton_is_interpreted(), **options,
        )  # fmt: skip
        rerank[grid](
            source, codebook, prepared.longest, scores, indices, row_levels, source, found.codes, found.distances,
            found.usage, sums, rows, size, levels, level, parts,
            BOUND=bound, QUANTIZE=found.usage is not None, **options,
        )  # fmt: skip
    if found.usage is not None:
        SUM_CODES.at_most(BK=rerank.BK)[grid](codebook, found.codes, found.quantized, rows, size, levels, D=width)


def codebook_assign(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """See `ztok_fast.ops.codebook_assign`; returns distances and codes.

    Work: M V d multiply-adds per level on the tensor cores (three times as many for float32 rows and codes, twice for
    float32 rows and bfloat16 codes), plus 2 d per row to rerank the best two.
    """
    if codebook.ndim == 2:
        found = search(x, codebook[None], metric, None, quantize=False)
        return found.distances.squeeze(1), found.codes.squeeze(1)
    found = search(x, codebook, metric, None, quantize=False)
    return found.distances, found.codes
