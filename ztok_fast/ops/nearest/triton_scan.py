"""Device functions of the nearest-code search: scan a codebook with tensor cores, then rerank what it leaves open.

**Scan.** Scores (the part of the distance that depends on the code: |c|^2/2 - x.c, -x.c or -x.c/|c|) come from
tensor-core products and are compared where they are made; no score is stored. A row keeps its best and second-best
code and the third-best score, no more.

float32 does not fit a tensor core. A float32 number is cut into a sum of bfloat16 terms, x = x_0 + x_1 + e with
|e| <= 2^-18 |x|, and the products x_0.c_0 + x_0.c_1 + x_1.c_0 are summed in float32: three bfloat16 products in place
of three tf32 ones at half the rate (the splitting is that of Henry, Tang and Heinecke, "Leveraging the bfloat16
artificial intelligence datatype for higher-precision computations", arXiv:1904.06376). bfloat16 codes have one
term and float16 codes two, both exact.

**Rerank.** `BOUND` bounds the error of a score relative to |c|max (|x| + |c|max) (`triton_bound.py`). Only codes whose
score is within twice that of the best, the threshold, can be the nearest. The best two are compared in float64, term
by term. If the third is within the threshold as well, the whole codebook is searched again for that row in float64.
What is open is known on the device alone; nothing waits for the host.

For l2 these are the terms of |x - c|^2, or for a far row, at least twice as long as every code, those of |c|^2 - 2 x.c:
x - c loses a code that is far shorter than x. Both are (c - a x)(c - b x), with a = b = 1 or a = 0 and b = 2.

The tile of codes is loaded as [codes, width], so both operands have the summed dimension innermost, as wgmma wants it.
"""

import triton
import triton.language as tl

NO_CODE = tl.constexpr(2147483647)


@triton.jit
def term_of(x):
    """float32 -> the nearest number that bfloat16 holds (ties to even), as float32; also under the interpreter."""
    bits = x.to(tl.uint32, bitcast=True)
    # NaN and infinity come out as NaN or infinity: rows that hold any are decided without looking at scores
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def dot_terms(x, codes, low_codes, acc, ROW_TERMS: tl.constexpr, CODE_TERMS: tl.constexpr):
    """acc [BM, BN] + x [BM, BK] . codes [BN, BK], largest product last. With one row term x has the type of codes."""
    if ROW_TERMS == 1:
        acc = tl.dot(x, tl.trans(codes), acc)
    else:
        high = term_of(x)
        low = term_of(x - high).to(codes.dtype)
        acc = tl.dot(low, tl.trans(codes), acc)
        if CODE_TERMS == 2:
            acc = tl.dot(high.to(codes.dtype), tl.trans(low_codes), acc)
        acc = tl.dot(high.to(codes.dtype), tl.trans(codes), acc)
    return acc


@triton.jit
def load_rows(x, rows, k, M, D: tl.constexpr, ROW_TERMS: tl.constexpr, UPCAST: tl.constexpr):
    """x [BM, BK] of the rows, zeros outside; float32 unless one term is exact."""
    mask = (rows < M)[:, None] & (k < D)[None, :]
    values = tl.load(x + rows.to(tl.int64)[:, None] * D + k[None, :], mask=mask, other=0.0)
    # the interpreter multiplies the bits of bfloat16 numbers, so there every operand is float32
    return values.to(tl.float32) if ROW_TERMS == 2 or UPCAST else values


@triton.jit
def load_codes(terms, cols, k, V, D: tl.constexpr, UPCAST: tl.constexpr):
    """A tile of one term of the codes [BN, BK], zeros outside."""
    mask = (cols < V)[:, None] & (k < D)[None, :]
    values = tl.load(terms + cols.to(tl.int64)[:, None] * D + k[None, :], mask=mask, other=0.0)
    return values.to(tl.float32) if UPCAST else values


@triton.jit
def score_of(acc, offset, cols, V, METRIC: tl.constexpr):
    """Scores [BM, BN] of products; infinity past the last code. `offset` is |c|^2/2, 1/|c| or unused."""
    if METRIC == "l2":
        score = offset[None, :] - acc
    elif METRIC == "cosine":
        score = -acc * offset[None, :]
    else:
        score = -acc
    return tl.where((cols < V)[None, :], score, float("inf"))


@triton.jit
def least_two(score, index):
    """Of [BM, BN] scores with distinct indices: the two least, their indices, and the third least, all [BM]."""
    first = tl.min(score, 1)
    first_index = tl.min(tl.where(score == first[:, None], index, NO_CODE), 1)
    rest = tl.where(index == first_index[:, None], float("inf"), score)
    second = tl.min(rest, 1)
    second_index = tl.min(tl.where(rest == second[:, None], index, NO_CODE), 1)
    third = tl.min(tl.where(index == second_index[:, None], float("inf"), rest), 1)
    return first, first_index, second, second_index, third


@triton.jit
def merge_two(a1, ai, a2, aj, a3, b1, bi, b2, bj, b3):
    """The two least and the third of two such groups; of equals, those of group a."""
    swap = b1 < a1
    loser, loser_index = tl.where(swap, a1, b1), tl.where(swap, ai, bi)
    runner, runner_index = tl.where(swap, b2, a2), tl.where(swap, bj, aj)
    third = tl.minimum(tl.maximum(loser, runner), tl.minimum(tl.minimum(a3, b3), tl.where(swap, a2, b2)))
    from_runner = runner < loser
    return (
        tl.where(swap, b1, a1),
        tl.where(swap, bi, ai),
        tl.where(from_runner, runner, loser),
        tl.where(from_runner, runner_index, loser_index),
        third,
    )


@triton.jit
def direct_score(x, codes, far, dot, c_square, METRIC: tl.constexpr):
    """Sums over one stretch of the width, float64, added to the score and (for cosine) |c|^2. `far`: 1 for far rows."""
    if METRIC == "l2":
        dot += tl.sum((codes - (1 - far) * x) * (codes - (1 + far) * x), 1)
    else:
        dot -= tl.sum(x * codes, 1)
    if METRIC == "cosine":
        c_square += tl.sum(codes * codes, 1)
    return dot, c_square


@triton.jit
def finish_score(dot, x_square, c_square, METRIC: tl.constexpr):
    """The float64 score of the sums; for cosine 0 where either is zero."""
    if METRIC == "cosine":
        length = tl.sqrt(x_square) * tl.sqrt(c_square)
        return tl.where(length > 0, dot / tl.where(length > 0, length, 1.0), 0.0)
    else:
        return dot


@triton.jit
def search_in_float64(
    x, row, x_square, far, book, V, D: tl.constexpr, METRIC: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr
):
    """Nearest code of one row and its score by float64 arithmetic over the whole codebook; of equals the lowest."""
    lanes = tl.arange(0, BV)
    best = tl.full([BV], float("inf"), tl.float64)
    code = tl.zeros([BV], tl.int32)
    for tile in range(0, tl.cdiv(V, BV)):
        cols = tile * BV + lanes
        dot, c_square = tl.zeros([BV], tl.float64), tl.zeros([BV], tl.float64)
        for start in range(0, tl.cdiv(D, BK)):
            k = start * BK + tl.arange(0, BK)
            values = tl.load(x + row.to(tl.int64) * D + k, mask=k < D, other=0.0).to(tl.float32).to(tl.float64)
            mask = (cols < V)[:, None] & (k < D)[None, :]
            codes = tl.load(book + cols.to(tl.int64)[:, None] * D + k[None, :], mask=mask, other=0.0)
            codes = codes.to(tl.float32).to(tl.float64)
            dot, c_square = direct_score(values[None, :], codes, far, dot, c_square, METRIC)
        score = tl.where(cols < V, finish_score(dot, x_square, c_square, METRIC), float("inf"))
        code = tl.where(score < best, cols, code)
        best = tl.minimum(best, score)
    least = tl.min(best, 0)
    return tl.min(tl.where(best == least, code, NO_CODE), 0), least


@triton.jit
def candidate_scores(
    x, rows, i, j, book, longest, M, V,
    D: tl.constexpr, METRIC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """float64 scores of the codes i and j of each row, |x|^2, 1 for far rows, and how many values are not finite."""
    x_square = tl.zeros([BM], tl.float64)
    bad = tl.zeros([BM], tl.int32)
    for start in range(0, tl.cdiv(D, BK)):
        values = load_rows(x, rows, start * BK + tl.arange(0, BK), M, D, 2, True)
        bad += tl.sum((tl.abs(values) < float("inf")).to(tl.int32) ^ 1, 1)
        x_square += tl.sum(values.to(tl.float64) * values.to(tl.float64), 1)
    far = (x_square >= 4 * longest.to(tl.float64) * longest.to(tl.float64)).to(tl.float64)
    zero = tl.zeros([BM], tl.float64)
    dot_i, dot_j, i_square, j_square = zero, zero, zero, zero
    for start in range(0, tl.cdiv(D, BK)):
        k = start * BK + tl.arange(0, BK)
        values = load_rows(x, rows, k, M, D, 2, True).to(tl.float64)
        code_i = load_codes(book, i, k, V, D, True).to(tl.float64)
        dot_i, i_square = direct_score(values, code_i, far[:, None], dot_i, i_square, METRIC)
        code_j = load_codes(book, j, k, V, D, True).to(tl.float64)
        dot_j, j_square = direct_score(values, code_j, far[:, None], dot_j, j_square, METRIC)
    score_i = finish_score(dot_i, x_square, i_square, METRIC)
    score_j = finish_score(dot_j, x_square, j_square, METRIC)
    return score_i, score_j, x_square, far, bad


@triton.jit
def rerank(
    x, rows, used, found, book, longest, M, V,
    BOUND: tl.constexpr, D: tl.constexpr, METRIC: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Codes int32 [BM] and distances float64 [BM] of rows of x from what the scan found, see the head of this file.

    Rows with NaN or infinity get code 0 and distance NaN. `longest` is the length of the longest code. Only rows that
    are `used` are searched a second time; what the others get has no meaning.
    """
    best, i, second, j, third = found
    score_i, score_j, x_square, far, bad = candidate_scores(x, rows, i, j, book, longest, M, V, D, METRIC, BM, BK)
    x_norm = tl.sqrt(x_square).to(tl.float32)
    if METRIC == "l2":
        scale = longest * (x_norm + longest)
    elif METRIC == "dot":
        scale = longest * x_norm
    else:
        scale = x_norm
    threshold = best + 2 * BOUND * scale
    # written so that NaN counts as open; below 1e-30 the products themselves lose bits to underflow
    sure = (scale > 1e-30) & (scale < 1e37)
    take_j = ((second > threshold).to(tl.int32) == 0) & ((score_j < score_i) | ((score_j == score_i) & (j < i)))
    code = tl.where(take_j, j, i)
    score = tl.where(take_j, score_j, score_i)
    open_rows = (((third > threshold) & sure).to(tl.int32) ^ 1) * ((bad == 0) & used).to(tl.int32)
    if METRIC != "l2":  # all codes are equally near a row of zeros
        zero_row = (x_norm == 0) & (open_rows == 1) & (score_i == 0)
        code = tl.where(zero_row, 0, code)
        score = tl.where(zero_row, 0.0, score)
        open_rows = tl.where(zero_row, 0, open_rows)
    left = tl.sum(open_rows, 0)
    while left > 0:
        row = tl.min(tl.where(open_rows == 1, rows, NO_CODE), 0)
        this = rows == row
        row_square, row_far = tl.sum(tl.where(this, x_square, 0.0), 0), tl.sum(tl.where(this, far, 0.0), 0)
        exact_code, exact_score = search_in_float64(x, row, row_square, row_far, book, V, D, METRIC, BV, BK)
        code = tl.where(this, exact_code, code)
        score = tl.where(this, exact_score, score)
        open_rows = tl.where(this, 0, open_rows)
        left -= 1
    code = tl.where(bad > 0, 0, code)
    if METRIC == "cosine":
        score += 1.0
    elif METRIC == "l2":
        score = tl.where(far > 0, score + x_square, score)
    return code, tl.where(bad > 0, float("nan"), score)
