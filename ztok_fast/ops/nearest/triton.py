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

from ztok_fast.ops.nearest import triton_configs as configs
from ztok_fast.ops.nearest import triton_kernels as kernels
from ztok_fast.ops.nearest.triton_error import relative_error
from ztok_fast.ops.requirements import triton_is_interpreted
from ztok_fast.ops.triton_tables import FUSION, capability_of, look_up


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
    tile = look_up(configs.PREPARE, capability_of(x), width)
    kernels.prepare_codes_kernel[(triton.cdiv(size, tile.rows), num_levels)](
        codebook, terms, offsets, longest, size, width, metric, code_terms,
        tile.rows, _step(tile.width, width), num_warps=tile.warps, **FUSION,
    )  # fmt: skip
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
    rel = relative_error(width, prepared.row_terms, prepared.code_terms)
    shape = width, prepared.row_terms, prepared.code_terms, capability_of(source)
    whole = configs.whole_tile(*shape)
    tile = whole or configs.wide_tile(*shape)
    if triton.cdiv(rows, tile.rows) >= configs.FULL_BLOCKS:
        sums = _new_sums(found, triton.cdiv(rows, tile.rows))
        _in_one_launch(source, codebook, prepared, metric, row_levels, found, sums, rel, tile, whole is not None)
    else:
        settle = look_up(configs.SETTLE, capability_of(source), width)
        sums = _new_sums(found, triton.cdiv(rows, settle.rows))
        _by_level(source, codebook, prepared, metric, row_levels, found, sums, rel, settle)
    if quantize:
        parts = levels * sums.shape[2]
        kernels.mean_error_kernel[(1,)](sums, *losses, parts, D=width, BP=configs.SUMS, num_warps=4, **FUSION)
    return found


def _new_sums(found: Found, blocks: int) -> Tensor | None:
    """Where every block of rows leaves its part of the loss at each level, float64 [2, L, blocks]."""
    if found.usage is None:
        return None
    return torch.empty((2, found.codes.shape[1], blocks), dtype=torch.float64, device=found.codes.device)


def _step(most: int, width: int) -> int:
    """A step of the width: no longer than the width needs."""
    return min(most, triton.next_power_of_2(width))


def _in_one_launch(source, codebook, prepared, metric, row_levels, found, sums, rel, tile, lanes):
    """All levels in one launch, for enough rows to fill the device. `lanes`: the tile covers the width."""
    rows, width = source.shape
    levels, size, _ = codebook.shape
    kernels.residual_search_kernel[(triton.cdiv(rows, tile.rows),)](
        source, codebook, prepared.terms, prepared.offsets, prepared.longest, row_levels, source,
        found.codes, found.distances, found.usage, found.quantized, sums, rows, size, levels,
        REL=rel, D=width, METRIC=metric, ROW_TERMS=prepared.row_terms, CODE_TERMS=prepared.code_terms,
        UPCAST=triton_is_interpreted(), LEVELS=row_levels is not None, QUANTIZE=found.usage is not None,
        LANES=lanes, BM=tile.rows, BN=tile.codes, BD=tile.width,
        BV=tile.settle_codes, BK=_step(tile.settle_width, width),
        num_warps=tile.warps, num_stages=tile.stages, **FUSION,
    )  # fmt: skip


def _part_scores(parts: int, source: Tensor) -> tuple[Tensor, Tensor]:
    """What `scan_kernel` leaves; of rows that use no level nothing is written or read."""
    rows = source.shape[0]
    scores = torch.empty((parts, 3, rows), dtype=torch.float32, device=source.device)
    return scores, torch.empty((parts, 2, rows), dtype=torch.int32, device=source.device)


def _by_level(source, codebook, prepared, metric, row_levels, found, sums, rel, settle):
    """Two launches per level (and one for the sum of the codes), for so few rows that the codebook has to be split over
    the device to fill it."""
    rows, width = source.shape
    levels, size, _ = codebook.shape
    quantize = found.usage is not None
    capability = capability_of(source)
    tile = configs.step_tile(rows, prepared.row_terms, prepared.code_terms, capability)
    blocks, tiles = triton.cdiv(rows, tile.rows), triton.cdiv(size, tile.codes)
    parts = max(1, min(tiles, configs.MOST_PARTS, configs.FULL_BLOCKS // blocks))
    tiles_per_part = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, tiles_per_part)
    scores, indices = _part_scores(parts, source)
    step = _step(settle.width, width)
    settle_grid = (triton.cdiv(rows, settle.rows),)
    for level in range(levels):
        kernels.scan_kernel[(blocks, parts)](
            source, prepared.terms[..., level, :, :] if prepared.code_terms == 1 else prepared.terms[0, level],
            prepared.terms[1, level] if prepared.code_terms == 2 else None,
            prepared.offsets[level], row_levels, scores, indices, rows, size, tiles_per_part, level,
            D=width, METRIC=metric, ROW_TERMS=prepared.row_terms, CODE_TERMS=prepared.code_terms,
            UPCAST=triton_is_interpreted(), LEVELS=row_levels is not None,
            BM=tile.rows, BN=tile.codes, BK=tile.width,
            num_warps=tile.warps, num_stages=tile.stages, **FUSION,
        )  # fmt: skip
        kernels.settle_kernel[settle_grid](
            source, codebook, prepared.longest, scores, indices, row_levels, source, found.codes, found.distances,
            found.usage, sums, rows, size, levels, level, parts,
            REL=rel, D=width, METRIC=metric, LEVELS=row_levels is not None, QUANTIZE=quantize,
            BM=settle.rows, BV=settle.codes, BK=step, num_warps=settle.warps, **FUSION,
        )  # fmt: skip
    if quantize:
        kernels.sum_codes_kernel[settle_grid](
            codebook, found.codes, found.quantized, rows, size, levels,
            D=width, BM=settle.rows, BK=step, num_warps=settle.warps, **FUSION,
        )  # fmt: skip


def codebook_assign(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """See `ztok_fast.ops.codebook_assign`; returns distances and codes.

    Work: M V d multiply-adds per level on the tensor cores (three times as many for float32 rows and codes, twice for
    float32 rows and bfloat16 codes), plus 2 d per row to settle the best two.
    """
    if codebook.ndim == 2:
        found = search(x, codebook[None], metric, None, quantize=False)
        return found.distances.squeeze(1), found.codes.squeeze(1)
    found = search(x, codebook, metric, None, quantize=False)
    return found.distances, found.codes
