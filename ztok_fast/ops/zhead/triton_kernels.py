"""Kernels of the Z head: logits are made tile by tile, used and forgotten.

`scan_kernel` reads the rows once, split over the second grid axis, and keeps for every sequence the two best scores,
the third, and an online log-sum-exp. `select_kernel` merges the parts and compares the best two in float64, as the
reference does; should the third be within the error of the scan as well, it searches all codes again in float64. So
the code is the reference's whatever the batch, the split or the order of the sums.

Scores are negated here: the least wins, as in the nearest-code search whose `least_two` is used.
"""

import triton
import triton.language as tl

from ztok_fast.ops.nearest.triton_scan import NO_CODE, least_two, load_codes, merge_two

# Bound of the error of float32 noise: the approximate logarithm of a GPU is off by up to 2^-22 where it is near 1, that
# is by 2^-16 of -log(1 - w) for the w >= 2^-6 that it is used for.
NOISE_ERROR = tl.constexpr(2.0**-14)


# Numbers wider than 32 bits come in halves of int32, which have one type whatever their value.
KEY = ("temperature_low", "temperature_high", "seed_low", "seed_high", "step")


@triton.jit
def int64_of(low, high):
    """The int64 of these bits."""
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def philox_word(code, row_id, seed_low, seed_high, step):
    """Word code % 4 of Philox4x32-10 with counter (code // 4, row id low, row id high, step): `philox.py`.

    All four words are made for each code, one is used: integer units have the time while the rows are read.
    """
    row_low, row_high = (row_id & 0xFFFFFFFF).to(tl.uint32), ((row_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0, c1, c2, c3 = tl.philox(int64_of(seed_low, seed_high), code // 4, row_low, row_high, step)
    which = code % 4
    return tl.where(which == 0, c0, tl.where(which == 1, c1, tl.where(which == 2, c2, c3)))


@triton.jit
def rough_noise(word):
    """Gumbel noise -log(-log(1 - w)), w = (word + 1/2) / 2^32, in float32; off by less than NOISE_ERROR."""
    w = (word.to(tl.float32) + 0.5) * 2.0**-32
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.0**-32  # 1 - w without cancellation
    series = w * (1 + w * (0.5 + w * (1.0 / 3 + w * 0.25)))
    return -tl.log(tl.where(w < 2.0**-6, series, -tl.log(rest)))


@triton.jit
def exact_noise(word):
    """The same in float64, where 1 - w is exact."""
    rest = ((word ^ 0xFFFFFFFF).to(tl.float64) + 0.5) * 2.0**-32
    return -tl.log(-tl.log(rest))


@triton.jit(do_not_specialize=["B", "V", "tiles", "parts", *KEY])
def scan_kernel(
    hidden, rows, row_ids, scores, indices, sums, B, V, tiles, parts,
    temperature_low, temperature_high, seed_low, seed_high, step,
    D: tl.constexpr, SAMPLE: tl.constexpr, ROW_IDS: tl.constexpr, UPCAST: tl.constexpr,
    BB: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Logits of `tiles` tiles of codes for BB sequences. Grid: blocks of sequences, parts of the codes.

    Writes least, second and third score to `scores` [3, B, parts], indices of the first two to `indices`
    [2, B, parts], and to `sums` [3, B, parts] the greatest logit, the sum of exp(logit - greatest) and the length of
    the longest row; greatest is NaN if a logit is not finite.
    """
    batch = tl.program_id(0) * BB + tl.arange(0, BB)
    part = tl.program_id(1)
    if SAMPLE:
        if ROW_IDS:
            ids = tl.load(row_ids + batch, mask=batch < B, other=0)
        else:
            ids = batch.to(tl.int64)
        scale = (1 / int64_of(temperature_low, temperature_high).to(tl.float64, bitcast=True)).to(tl.float32)
    first = tl.full([BB], float("inf"), tl.float32)
    second, third = first, first
    i = tl.zeros([BB], tl.int32)
    j = i
    greatest = tl.full([BB], float("-inf"), tl.float32)
    total = tl.zeros([BB], tl.float32)
    bad = tl.zeros([BB], tl.int32)
    longest = tl.zeros([BV], tl.float32)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(V, BV))):
        codes = tile * BV + tl.arange(0, BV)
        acc = tl.zeros([BV, BB], tl.float32)
        square = tl.zeros([BV], tl.float32)
        for step_k in range(0, tl.cdiv(D, BK)):
            k = step_k * BK + tl.arange(0, BK)
            r = load_codes(rows, codes, k, V, D, UPCAST)
            h = load_codes(hidden, batch, k, B, D, UPCAST)
            acc = tl.dot(r, tl.trans(h), acc, input_precision="ieee")
            square += tl.sum(r.to(tl.float32) * r.to(tl.float32), 1)
        longest = tl.maximum(longest, square)
        inside = (codes < V)[:, None]
        bad += tl.sum((inside & ((tl.abs(acc) < float("inf")).to(tl.int32) == 0)).to(tl.int32), 0)
        logits = tl.where(inside, acc, float("-inf"))
        higher = tl.maximum(greatest, tl.max(logits, 0))
        # an infinite logit ends as NaN whatever this gives
        total = total * tl.exp(greatest - higher) + tl.sum(tl.exp(logits - higher[None, :]), 0)
        greatest = higher
        if SAMPLE:
            word = philox_word(tl.broadcast_to(codes[:, None], [BV, BB]), ids[None, :], seed_low, seed_high, step)
            logits = logits * scale + rough_noise(word)
        score = tl.where(inside, -logits, float("inf"))
        code = tl.broadcast_to(codes[:, None], [BV, BB])
        a, ai, b, bj, c = least_two(tl.trans(score), tl.trans(code))
        first, i, second, j, third = merge_two(first, i, second, j, third, a, ai, b, bj, c)
    at = batch.to(tl.int64) * parts + part
    plane = B.to(tl.int64) * parts
    keep = batch < B
    tl.store(scores + at, first, mask=keep)
    tl.store(scores + plane + at, second, mask=keep)
    tl.store(scores + 2 * plane + at, third, mask=keep)
    tl.store(indices + at, i, mask=keep)
    tl.store(indices + plane + at, j, mask=keep)
    tl.store(sums + at, tl.where(bad > 0, float("nan"), greatest), mask=keep)
    tl.store(sums + plane + at, total, mask=keep)
    tl.store(sums + 2 * plane + at, tl.zeros([BB], tl.float32) + tl.sqrt(tl.max(longest, 0)), mask=keep)


@triton.jit
def exact_logits(hidden, rows, row, codes, V, D: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr):
    """float64 logits [BC] of some codes for one sequence, rounded to float32 as in the reference; and |hidden|^2."""
    acc = tl.zeros([BC], tl.float64)
    square = tl.zeros([1], tl.float64)
    for start in range(0, tl.cdiv(D, BK)):
        k = start * BK + tl.arange(0, BK)
        h = tl.load(hidden + row.to(tl.int64) * D + k, mask=k < D, other=0.0).to(tl.float32).to(tl.float64)[None, :]
        mask = ((codes >= 0) & (codes < V))[:, None] & (k < D)[None, :]
        r = tl.load(rows + codes.to(tl.int64)[:, None] * D + k[None, :], mask=mask, other=0.0)
        acc += tl.sum(h * r.to(tl.float32).to(tl.float64), 1)
        square += tl.sum(h * h, 1)
    return acc.to(tl.float32).to(tl.float64), tl.sum(square, 0)


@triton.jit
def exact_scores(logits, codes, row_id, seed_low, seed_high, step, temperature, SAMPLE: tl.constexpr):
    """Negated float64 scores of float64 logits."""
    if SAMPLE:
        return -(logits / temperature + exact_noise(philox_word(codes, row_id, seed_low, seed_high, step)))
    else:
        return -logits


@triton.jit(do_not_specialize=["V", "parts", *KEY])
def select_kernel(
    hidden, rows, row_ids, scores, indices, sums, codes, log_probs, V, parts,
    temperature_low, temperature_high, seed_low, seed_high, step,
    BOUND: tl.constexpr, D: tl.constexpr, SAMPLE: tl.constexpr, ROW_IDS: tl.constexpr,
    P: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Code and log-probability of one sequence from its parts. BOUND: error of a logit per |hidden| |longest row|."""
    row = tl.program_id(0)
    plane = tl.num_programs(0).to(tl.int64) * parts
    row_id = row.to(tl.int64)
    temperature = int64_of(temperature_low, temperature_high).to(tl.float64, bitcast=True) if SAMPLE else 1.0
    if SAMPLE and ROW_IDS:
        row_id = tl.load(row_ids + row)
    # firsts and seconds of all parts side by side: 2 P candidates with distinct codes
    lanes = tl.arange(0, 2 * P)
    part = lanes % P
    at = row.to(tl.int64) * parts + part
    group = (lanes // P) * plane + at
    inside = part < parts
    score = tl.load(scores + group, mask=inside, other=float("inf"))
    index = tl.load(indices + group, mask=inside, other=0)
    index = tl.where(score < float("inf"), index, NO_CODE - lanes)
    first, i, second, j, third = least_two(score[None, :], index[None, :])
    third = tl.minimum(tl.min(third, 0), tl.min(tl.load(scores + 2 * plane + at, mask=inside, other=float("inf")), 0))
    greatest = tl.load(sums + at, mask=inside, other=float("-inf"))
    total = tl.load(sums + plane + at, mask=inside & (lanes < P), other=0.0)
    longest = tl.max(tl.load(sums + 2 * plane + at, mask=inside, other=0.0), 0)
    bad = tl.sum((greatest != greatest).to(tl.int32), 0) > 0
    highest = tl.max(greatest, 0)
    total = tl.sum(tl.where(total > 0, total.to(tl.float64) * tl.exp((greatest - highest).to(tl.float64)), 0.0), 0)

    two = tl.arange(0, 2)
    pair = tl.where(two == 0, tl.min(i, 0), tl.min(j, 0))
    logits, square = exact_logits(hidden, rows, row, pair, V, D, 2, BK)
    exact = exact_scores(logits, pair, row_id, seed_low, seed_high, step, temperature, SAMPLE)
    error = BOUND * tl.sqrt(square).to(tl.float32) * longest
    if SAMPLE:
        scale = temperature.to(tl.float32)  # type: ignore[union-attr] # a tensor where SAMPLE is set
        error = error / scale + NOISE_ERROR + 2.0**-20 * tl.abs(tl.min(first, 0))
    threshold = tl.min(first, 0) + 2 * error
    # written so that NaN, from scores that overflow float32 at a temperature near 0, counts as open
    far = tl.where(two == 0, tl.min(first, 0), tl.min(second, 0)) > threshold
    exact = tl.where(far, float("inf"), exact)
    least = tl.min(exact, 0)
    code = tl.min(tl.where(exact == least, pair, NO_CODE), 0)
    logit = tl.max(tl.where(pair == code, logits, float("-inf")), 0)
    if ((third > threshold) | bad).to(tl.int32) == 0:
        lanes_c = tl.arange(0, BC)
        best = tl.full([BC], float("inf"), tl.float64)
        best_code = tl.full([BC], NO_CODE, tl.int32)
        best_logit = tl.zeros([BC], tl.float64)
        for tile in range(0, tl.cdiv(V, BC)):
            some = tile * BC + lanes_c
            their_logits, square = exact_logits(hidden, rows, row, some, V, D, BC, BK)
            value = exact_scores(their_logits, some, row_id, seed_low, seed_high, step, temperature, SAMPLE)
            value = tl.where(some < V, value, float("inf"))
            better = value < best
            best, best_code = tl.where(better, value, best), tl.where(better, some, best_code)
            best_logit = tl.where(better, their_logits, best_logit)
        least = tl.min(best, 0)
        code = tl.min(tl.where(best == least, best_code, NO_CODE), 0)
        logit = tl.max(tl.where(best_code == code, best_logit, float("-inf")), 0)
    log_prob = logit - highest.to(tl.float64) - tl.log(total)
    tl.store(codes + row, tl.where(bad, 0, code))
    tl.store(log_probs + row, tl.where(bad, float("nan"), log_prob.to(tl.float32)))
