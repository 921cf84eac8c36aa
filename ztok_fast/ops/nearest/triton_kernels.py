"""Kernels of the nearest-code search, built from the device functions of `triton_scan.py`.

    prepare_codes_kernel    offsets, terms and greatest length of the codes, once per call
    residual_search_kernel  all levels in one launch; a block owns BM rows              (enough rows to fill the device)
    scan_kernel             one level; the codebook is split over the second grid axis  (few rows)
    rerank_kernel           merges the parts of scan_kernel and makes the next level's residual
    sum_codes_kernel        the sum of a row's codes over the levels
    mean_error_kernel       the loss from the sums that each block of rows left at each level

Between two levels the residual of a block of rows goes through global memory: its BM x d x 4 bytes are read back by the
block that wrote them, out of L1 or L2. Registers have no room for it beside the running minima of the scan.

With few rows a level takes two launches. In one launch a level could begin only when every part of the level before is
merged, which is a barrier over the whole grid; that deadlocks unless all blocks are resident at once.

A block of rows none of which has a level left is not searched, and neither are its scores read.

The number of rows and of codes are run-time numbers that no code is specialised on; the width is a constant.
"""

import triton
import triton.language as tl

from ztok_fast.ops.nearest.triton_scan import (
    dot_terms,
    least_two,
    load_codes,
    load_rows,
    merge_two,
    rerank,
    score_of,
    term_of,
)


@triton.jit(do_not_specialize=["V"])
def prepare_codes_kernel(
    book, terms, offsets, longest, V,
    D: tl.constexpr, METRIC: tl.constexpr, CODE_TERMS: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Per code |c|^2/2 (l2) or 1/|c| (cosine, 0 for a code of zeros), per level the greatest |c| (as bits), and with
    CODE_TERMS = 2 the two bfloat16 terms [2, L, V, D] of the codes [L, V, D]. Grid: blocks of codes, levels."""
    level, levels = tl.program_id(1), tl.num_programs(1)
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    in_book = (level.to(tl.int64) * V + cols)[:, None] * D
    square = tl.zeros([BV], tl.float64)
    for start in range(0, tl.cdiv(D, BK)):
        k = start * BK + tl.arange(0, BK)
        mask = (cols < V)[:, None] & (k < D)[None, :]
        codes = tl.load(book + in_book + k[None, :], mask=mask, other=0.0).to(tl.float32)
        square += tl.sum(codes.to(tl.float64) * codes.to(tl.float64), 1)
        if CODE_TERMS == 2:
            high = term_of(codes)
            low = term_of(codes - high)
            tl.store(terms + in_book + k[None, :], high.to(terms.dtype.element_ty), mask=mask)
            second = levels.to(tl.int64) * V * D
            tl.store(terms + second + in_book + k[None, :], low.to(terms.dtype.element_ty), mask=mask)
    if METRIC == "l2":
        offset = square / 2
    else:
        offset = tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    tl.store(offsets + level * V + cols, offset.to(tl.float32), mask=cols < V)
    # lengths are not negative, so their bits are in the order of their values; integer maxima come in any order
    length = tl.max(tl.sqrt(square), 0).to(tl.float32)
    tl.atomic_max(longest + level, length.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def store_sums(sums, level, L, error, pairs):
    """What the program's block of rows adds to the loss at a level: float64 sums [2, L, blocks] of errors and pairs."""
    at = sums + level * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, error)
    tl.store(at + L * tl.num_programs(0), pairs)


@triton.jit
def write_level(
    x, rows, code, distance, used, book, residual, codes_out, distances, usage, sums, level, last, M, V, L,
    D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, USAGE: tl.constexpr,
):  # fmt: skip
    """Codes (-1 in rows that do not use the level), distances, usage counts, the block's sums for the loss, and what a
    level leaves over."""
    inside = rows < M
    out = rows.to(tl.int64) * L + level
    tl.store(codes_out + out, tl.where(used, code, -1), mask=inside)
    tl.store(distances + out, tl.where(used, distance, 0.0).to(tl.float32), mask=inside)
    if USAGE:  # integer sums: the order of the additions does not matter
        one = tl.full([BM], 1, tl.int64)
        tl.atomic_add(usage + level * V + code, one, mask=inside & used, sem="relaxed")
        pairs = tl.sum(used.to(tl.int32), 0).to(tl.float64)
        store_sums(sums, level, L, tl.sum(tl.where(used, distance, 0.0), 0), pairs)
    if not last:
        for start in range(0, tl.cdiv(D, BK)):
            k = start * BK + tl.arange(0, BK)
            left = load_rows(x, rows, k, M, D, 2, True)
            chosen = load_codes(book, code, k, V, D, True)
            left -= tl.where(used[:, None], chosen, 0.0)
            mask = inside[:, None] & (k < D)[None, :]
            tl.store(residual + rows.to(tl.int64)[:, None] * D + k[None, :], left, mask=mask)


@triton.jit
def write_no_level(rows, codes_out, distances, sums, level, M, L, BM: tl.constexpr, USAGE: tl.constexpr):
    """What a level gives rows that do not use it, in a block where none does: their residual is not touched."""
    out = rows.to(tl.int64) * L + level
    tl.store(codes_out + out, tl.full([BM], -1, tl.int32), mask=rows < M)
    tl.store(distances + out, tl.zeros([BM], tl.float32), mask=rows < M)
    if USAGE:
        zero = tl.sum(tl.zeros([BM], tl.float64), 0)
        store_sums(sums, level, L, zero, zero)


@triton.jit
def scan_lanes(
    x, rows, terms, low_terms, offsets, M, V,
    D: tl.constexpr, METRIC: tl.constexpr, ROW_TERMS: tl.constexpr, CODE_TERMS: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The whole codebook for BM rows whose width is one tile: every lane of a tile keeps minima of its own, and the
    lanes of a row meet once, after the last tile."""
    k = tl.arange(0, BD)
    lanes = tl.arange(0, BN)
    values = load_rows(x, rows, k, M, D, ROW_TERMS, UPCAST)
    best = tl.full([BM, BN], float("inf"), tl.float32)
    second = tl.full([BM, BN], float("inf"), tl.float32)
    tile_of_best = tl.zeros([BM, BN], tl.int32)
    for tile in range(0, tl.cdiv(V, BN)):
        cols = tile * BN + lanes
        codes = load_codes(terms, cols, k, V, D, UPCAST)
        low = load_codes(low_terms, cols, k, V, D, UPCAST) if CODE_TERMS == 2 else codes
        acc = dot_terms(values, codes, low, tl.zeros([BM, BN], tl.float32), ROW_TERMS, CODE_TERMS)
        offset = tl.load(offsets + cols, mask=cols < V, other=0.0)
        score = score_of(acc, offset, cols, V, METRIC)
        second = tl.minimum(second, tl.maximum(score, best))
        tile_of_best = tl.where(score < best, tile, tile_of_best)
        best = tl.minimum(best, score)
    first, i, runner, j, third = least_two(best, tile_of_best * BN + lanes[None, :])
    # a lane's own second has lost its index: it can only be the third
    return first, i, runner, j, tl.minimum(third, tl.min(second, 1))


@triton.jit
def scan_steps(
    x, rows, terms, low_terms, offsets, M, V, begin, end,
    D: tl.constexpr, METRIC: tl.constexpr, ROW_TERMS: tl.constexpr, CODE_TERMS: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The tiles of codes [begin, end) for BM rows, the width in steps of BK; a row's lanes meet after every tile."""
    first = tl.full([BM], float("inf"), tl.float32)
    second, third = first, first
    i = tl.zeros([BM], tl.int32)
    j = i
    for tile in range(begin, end):
        cols = tile * BN + tl.arange(0, BN)
        acc = tl.zeros([BM, BN], tl.float32)
        for step in range(0, tl.cdiv(D, BK)):
            k = step * BK + tl.arange(0, BK)
            values = load_rows(x, rows, k, M, D, ROW_TERMS, UPCAST)
            codes = load_codes(terms, cols, k, V, D, UPCAST)
            low = load_codes(low_terms, cols, k, V, D, UPCAST) if CODE_TERMS == 2 else codes
            acc = dot_terms(values, codes, low, acc, ROW_TERMS, CODE_TERMS)
        offset = tl.load(offsets + cols, mask=cols < V, other=0.0)
        score = score_of(acc, offset, cols, V, METRIC)
        a, ai, b, bj, c = least_two(score, tl.broadcast_to(cols[None, :], score.shape))
        first, i, second, j, third = merge_two(first, i, second, j, third, a, ai, b, bj, c)
    return first, i, second, j, third


@triton.jit(do_not_specialize=["M", "V", "L"])
def residual_search_kernel(
    x, book, terms, offsets, longest, row_levels, residual, codes, distances, usage, quantized, sums, M, V, L,
    BOUND: tl.constexpr, D: tl.constexpr, METRIC: tl.constexpr, ROW_TERMS: tl.constexpr, CODE_TERMS: tl.constexpr,
    UPCAST: tl.constexpr, LEVELS: tl.constexpr, QUANTIZE: tl.constexpr, LANES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """All L levels of BM rows. LEVELS: rows use `row_levels` of them. QUANTIZE: also usage counts, the sum of codes
    and the sums of errors for the loss.
    LANES: BD covers the width (`scan_lanes`); else the width is walked in steps of BD (`scan_steps`).
    `residual` [M, D] float32 is x itself if there is more than one level."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    used_levels = tl.where(rows < M, L, 0)
    if LEVELS:
        used_levels = tl.minimum(tl.load(row_levels + rows, mask=rows < M, other=0).to(tl.int32), used_levels)
    book_size = V.to(tl.int64) * D
    deepest = tl.maximum(tl.max(used_levels, 0), 0)
    for level in range(0, deepest):
        at = book_size * level
        low = terms + book_size * L + at
        used = used_levels > level
        if LANES:
            found = scan_lanes(
                x, rows, terms + at, low, offsets + level * V, M, V,
                D, METRIC, ROW_TERMS, CODE_TERMS, UPCAST, BM, BN, BD,
            )  # fmt: skip
        else:
            found = scan_steps(
                x, rows, terms + at, low, offsets + level * V, M, V, 0, tl.cdiv(V, BN),
                D, METRIC, ROW_TERMS, CODE_TERMS, UPCAST, BM, BN, BD,
            )  # fmt: skip
        length = tl.load(longest + level).to(tl.float32, bitcast=True)
        code, distance = rerank(x, rows, used, found, book + at, length, M, V, BOUND, D, METRIC, BM, BV, BK)
        # every thread has read the residual before any writes it, and has written it before the next level reads it
        tl.debug_barrier()
        write_level(
            x, rows, code, distance, used, book + at, residual, codes, distances, usage, sums, level, level + 1 == L,
            M, V, L, D, BM, BK, QUANTIZE,
        )  # fmt: skip
        tl.debug_barrier()
    for level in range(deepest, L):
        write_no_level(rows, codes, distances, sums, level, M, L, BM, QUANTIZE)
    if QUANTIZE:
        # the codes of the levels above are read back
        tl.debug_barrier()
        sum_codes(rows, book, codes, quantized, M, V, L, D, BK)


@triton.jit
def sum_codes(rows, book, codes, quantized, M, V, L, D: tl.constexpr, BK: tl.constexpr):
    """quantized = the sum of the chosen codes in the order of the levels, in float32."""
    for start in range(0, tl.cdiv(D, BK)):
        k = start * BK + tl.arange(0, BK)
        mask = (rows < M)[:, None] & (k < D)[None, :]
        total = load_codes(book, rows, k, 0, D, True)  # zeros
        for level in range(0, L):
            at = V.to(tl.int64) * D * level
            code = tl.load(codes + rows.to(tl.int64) * L + level, mask=rows < M, other=-1)
            chosen = load_codes(book + at, tl.where(code < 0, V, code), k, V, D, True)
            total += chosen
        if quantized.dtype.element_ty == tl.bfloat16:  # the interpreter's cast cuts off, that of a GPU rounds
            total = term_of(total)
        out = quantized + rows.to(tl.int64)[:, None] * D + k[None, :]
        tl.store(out, total.to(quantized.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "V", "L"])
def sum_codes_kernel(book, codes, quantized, M, V, L, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """`sum_codes` of BM rows."""
    sum_codes(tl.program_id(0) * BM + tl.arange(0, BM), book, codes, quantized, M, V, L, D, BK)


@triton.jit(do_not_specialize=["M", "V", "tiles", "level"])
def scan_kernel(
    x, terms, low_terms, offsets, row_levels, scores, indices, M, V, tiles, level,
    D: tl.constexpr, METRIC: tl.constexpr, ROW_TERMS: tl.constexpr, CODE_TERMS: tl.constexpr, UPCAST: tl.constexpr,
    LEVELS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of codes for BM rows, the width in steps of BK. Grid: blocks of rows, parts of the codebook.
    Writes the part's two least scores and the third to `scores` [parts, 3, M], indices of the two to [parts, 2, M];
    nothing, and nothing is searched, for a block of rows none of which uses the level (LEVELS)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < M
    part = tl.program_id(1)
    begin = part * tiles
    end = tl.minimum(begin + tiles, tl.cdiv(V, BN))
    if LEVELS:
        searched = tl.max((tl.load(row_levels + rows, mask=inside, other=0) > level).to(tl.int32), 0) > 0
        end = tl.where(searched, end, begin)
        inside = rows < tl.where(searched, M, 0)
    first, i, second, j, third = scan_steps(
        x, rows, terms, low_terms, offsets, M, V, begin, end,
        D, METRIC, ROW_TERMS, CODE_TERMS, UPCAST, BM, BN, BK,
    )  # fmt: skip
    at = part.to(tl.int64) * M + rows
    tl.store(scores + 3 * part.to(tl.int64) * M + rows, first, mask=inside)
    tl.store(scores + (3 * part.to(tl.int64) + 1) * M + rows, second, mask=inside)
    tl.store(scores + (3 * part.to(tl.int64) + 2) * M + rows, third, mask=inside)
    tl.store(indices + at + part.to(tl.int64) * M, i, mask=inside)
    tl.store(indices + at + (part.to(tl.int64) + 1) * M, j, mask=inside)


@triton.jit(do_not_specialize=["M", "V", "L", "level", "parts"])
def rerank_kernel(
    x, book, longest, scores, indices, row_levels, residual, codes, distances, usage, sums, M, V, L, level, parts,
    BOUND: tl.constexpr, D: tl.constexpr, METRIC: tl.constexpr, LEVELS: tl.constexpr, QUANTIZE: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Codes and distances of BM rows at one level from the parts that `scan_kernel` left; the next level's residual."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    used = rows < M
    if LEVELS:
        used = tl.load(row_levels + rows, mask=used, other=0) > level
    if tl.max(used.to(tl.int32), 0) > 0:
        first = tl.full([BM], float("inf"), tl.float32)
        second, third = first, first
        i = tl.zeros([BM], tl.int32)
        j = i
        for part in range(0, parts):  # in a fixed order
            s = scores + M.to(tl.int64) * 3 * part + rows
            n = indices + M.to(tl.int64) * 2 * part + rows
            # rows that do not use the level may have no scores
            a, b, c = tl.load(s, used, 0.0), tl.load(s + M, used, 0.0), tl.load(s + 2 * M, used, 0.0)
            ai, bj = tl.load(n, used, 0), tl.load(n + M, used, 0)
            first, i, second, j, third = merge_two(first, i, second, j, third, a, ai, b, bj, c)
        at = level.to(tl.int64) * V * D
        found = first, i, second, j, third
        length = tl.load(longest + level).to(tl.float32, bitcast=True)
        code, distance = rerank(x, rows, used, found, book + at, length, M, V, BOUND, D, METRIC, BM, BV, BK)
        # the residual is read for the last time before any thread writes it
        tl.debug_barrier()
        write_level(
            x, rows, code, distance, used, book + at, residual, codes, distances, usage, sums, level, level + 1 == L,
            M, V, L, D, BM, BK, QUANTIZE,
        )  # fmt: skip
    else:
        write_no_level(rows, codes, distances, sums, level, M, L, BM, QUANTIZE)


@triton.jit(do_not_specialize=["parts"])
def mean_error_kernel(sums, commitment, codebook_loss, parts, D: tl.constexpr, BP: tl.constexpr):
    """Both losses, float32: the sum of the errors over that of the pairs and over the width; 0 without a pair. `sums`
    [2, parts] are added in a fixed order by one program."""
    error = tl.zeros([BP], tl.float64)
    pairs = tl.zeros([BP], tl.float64)
    for start in range(0, tl.cdiv(parts, BP)):
        at = start * BP + tl.arange(0, BP)
        error += tl.load(sums + at, mask=at < parts, other=0.0)
        pairs += tl.load(sums + parts + at, mask=at < parts, other=0.0)
    loss = (tl.sum(error, 0) / (tl.maximum(tl.sum(pairs, 0), 1.0) * D)).to(tl.float32)
    tl.store(commitment, loss)
    tl.store(codebook_loss, loss)
