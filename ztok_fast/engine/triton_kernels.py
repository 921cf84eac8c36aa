"""Triton kernels of the engine's passes, with the arithmetic of docs/determinism.md.

They are launched without fusion: only `tl.fma` rounds once. `/` and `-x` are not used on floats, since Triton's
division is approximate and its `-x` is 0 - x, which loses the sign of zero.

Each row of a pass has a slot and a number of keys that it sees, its own included. It sees none where it is padding.
"""

import triton
import triton.language as tl

from ztok_fast.ops.triton_arithmetic import exp


@triton.jit
def sum_of_lanes(lanes):
    """The sum of 16 lanes, halves added to halves."""
    lanes = tl.sum(tl.reshape(lanes, [2, 8]), 0)
    lanes = tl.sum(tl.reshape(lanes, [2, 4]), 0)
    lanes = tl.sum(tl.reshape(lanes, [2, 2]), 0)
    return tl.sum(lanes, 0)


@triton.jit
def norm_factor(x, D, eps):
    """1 / sqrt(mean of squares + eps) of the D values at x, a multiple of 16."""
    lane = tl.arange(0, 16)
    lanes = tl.zeros([16], tl.float32)
    for start in range(0, D, 16):
        v = tl.load(x + start + lane)
        lanes = tl.fma(v, v, lanes)
    total = sum_of_lanes(lanes)
    root = tl.math.sqrt_rn(tl.math.div_rn(total, total * 0 + D) + eps)
    return tl.math.div_rn(root * 0 + 1, root)


@triton.jit
def norm_kernel(x, weight, y, D, eps, BK: tl.constexpr):
    """RMSNorm. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    factor = norm_factor(x + row * D, D, eps)
    for start in range(0, D, BK):
        i = start + tl.arange(0, BK)
        v = tl.load(x + row * D + i, mask=i < D)
        w = tl.load(weight + i, mask=i < D)
        tl.store(y + row * D + i, (v * factor) * w, mask=i < D)


@triton.jit
def angles_kernel(positions, frequencies, sines, cosines, HALF, BH: tl.constexpr):
    """Sines and cosines [R, HALF] of position times frequency, in float64. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BH)
    angle = tl.load(positions + row).to(tl.float32) * tl.load(frequencies + i, mask=i < HALF, other=0.0)
    x = angle.to(tl.float64)
    # adding 1.5 * 2^52 rounds to an integer, ties to even
    k = (x * 0.63661977236758134308 + 6755399441055744.0) - 6755399441055744.0
    r = ((x - k * 1.57079632673412561417e00) - k * 6.07710050630396597660e-11) - k * 2.02226624879595063154e-21
    z = r * r
    s = z * 1.58969099521155010221e-10 + -2.50507602534068634195e-08
    s = z * s + 2.75573137070700676789e-06
    s = z * s + -1.98412698298579493134e-04
    s = z * s + 8.33333333332248946124e-03
    s = z * s + -1.66666666666666324348e-01
    s = r + (r * z) * s
    c = z * -1.13596475577881948265e-11 + 2.08757232129817482790e-09
    c = z * c + -2.75573143513906633035e-07
    c = z * c + 2.48015872894767294178e-05
    c = z * c + -1.38888888888741095749e-03
    c = z * c + 4.16666666666666019037e-02
    c = (1.0 - z * 0.5) + (z * z) * c
    turn = k.to(tl.int64) & 3
    sine, cosine = tl.where(turn % 2 == 0, s, c), tl.where(turn % 2 == 0, c, s)
    sine = tl.where(turn >= 2, sine * -1.0, sine)
    cosine = tl.where((turn == 1) | (turn == 2), cosine * -1.0, cosine)
    tl.store(sines + row * HALF + i, sine.to(tl.float32), mask=i < HALF)
    tl.store(cosines + row * HALF + i, cosine.to(tl.float32), mask=i < HALF)


@triton.jit
def store_cached(place, x, mask):
    """Store what the cache keeps: limited to the range of its type, float16 or float32, and rounded to it."""
    if place.dtype.element_ty == tl.float16:
        limited = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
        x = tl.where(x == x, limited, x)
    tl.store(place, x.to(place.dtype.element_ty), mask=mask)


@triton.jit
def rotate_kernel(
    qkv, norms, sines, cosines, slots, seen, queries, keys, values, H, KV, C, eps, d: tl.constexpr, BH: tl.constexpr
):
    """The heads of a row: queries are rotated, keys rotated and cached, values cached. Grid: rows, H + 2 KV.

    `norms` [2, d]: weights of the norms of queries and keys, or None. `keys` [slots, KV, C / 16, d, 16] and `values`
    [slots, KV, C, d] are the arenas of one layer, float16 or float32.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    x = qkv + (row * (H + 2 * KV) + head) * d
    i = tl.arange(0, BH)
    inside = i < d // 2
    low = tl.load(x + i, mask=inside, other=0.0)
    high = tl.load(x + d // 2 + i, mask=inside, other=0.0)
    if head < H + KV:
        if norms is not None:
            weight = norms + tl.where(head < H, 0, d) + i
            factor = norm_factor(x, d, eps)
            low = (low * factor) * tl.load(weight, mask=inside, other=0.0)
            high = (high * factor) * tl.load(weight + d // 2, mask=inside, other=0.0)
        sine = tl.load(sines + row * (d // 2) + i, mask=inside, other=0.0)
        cosine = tl.load(cosines + row * (d // 2) + i, mask=inside, other=0.0)
        first = tl.fma(low, cosine, (high * sine) * -1.0)
        high = tl.fma(high, cosine, low * sine)
        low = first
    own = tl.load(seen + row) - 1
    if head < H:
        y = queries + (row * H + head) * d + i
        tl.store(y, low, mask=inside)
        tl.store(y + d // 2, high, mask=inside)
    elif own >= 0:
        slot = tl.load(slots + row)
        if head < H + KV:
            key = keys + ((slot * KV + head - H) * C + own // 16 * 16) * d + own % 16 + i * 16
            store_cached(key, low, inside)
            store_cached(key + d // 2 * 16, high, inside)
        else:
            value = values + ((slot * KV + head - H - KV) * C + own) * d + i
            store_cached(value, low, inside)
            store_cached(value + d // 2, high, inside)


@triton.jit
def scores_kernel(
    queries, keys, slots, seen, scores, KV, C, N, scale,
    d: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Scores [R, KV, G, N] of the G query heads of a key head, for BN keys. Grid: rows, KV, blocks of keys."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    start = tl.program_id(2) * BN
    n = tl.load(seen + row)
    if start < n:
        j = start + tl.arange(0, BN)
        g = tl.arange(0, BG)
        query = queries + ((row * KV + head) * G + g) * d
        key = keys + ((tl.load(slots + row) * KV + head) * C + j // 16 * 16) * d + j % 16
        sums = tl.zeros([BG, BN], tl.float32)
        for i in range(d):
            q = tl.load(query + i, mask=g < G, other=0.0)
            k = tl.load(key + i * 16, mask=j < n, other=0.0).to(tl.float32)
            sums = tl.fma(tl.broadcast_to(q[:, None], [BG, BN]), tl.broadcast_to(k[None, :], [BG, BN]), sums)
        place = scores + (((row * KV + head) * G + g) * N)[:, None] + j[None, :]
        tl.store(place, sums * scale, mask=(g < G)[:, None] & (j < n)[None, :])


@triton.jit
def softmax_kernel(scores, seen, H, N, BN: tl.constexpr):
    """Scores become exp(score - maximum), in place. Grid: rows, heads."""
    row = tl.program_id(0).to(tl.int64)
    line = scores + (row * H + tl.program_id(1)) * N
    n = tl.load(seen + row)
    most = tl.full([BN], float("-inf"), tl.float32)
    for start in range(0, n, BN):
        j = start + tl.arange(0, BN)
        most = tl.maximum(most, tl.load(line + j, mask=j < n, other=float("-inf")))
    largest = tl.max(most, 0)
    for start in range(0, n, BN):
        j = start + tl.arange(0, BN)
        s = tl.load(line + j, mask=j < n, other=float("-inf"))
        tl.store(line + j, exp(s - largest), mask=j < n)


@triton.jit
def values_kernel(
    weights, values, slots, seen, y, H, KV, C, N, d: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """The values of a head by their weights [R, H, N], in four chains, over the sum of the weights. Grid: rows, H."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    n = tl.load(seen + row)
    line = weights + (row * H + head) * N
    value = values + (tl.load(slots + row) * KV + head // (H // KV)) * C * d
    i = tl.arange(0, BD)
    lanes = tl.zeros([16], tl.float32)
    chains = tl.zeros([4, BD], tl.float32)
    for start in range(0, n, 16):
        j = start + tl.arange(0, 16)
        lanes += tl.load(line + j, mask=j < n, other=0.0)
        for part in tl.static_range(0, 16, 4):
            c = start + part + tl.arange(0, 4)
            here = (c < n)[:, None]
            p = tl.load(line + c, mask=c < n, other=0.0)
            v = tl.load(value + c[:, None] * d + i[None, :], mask=here & (i < d)[None, :], other=0.0).to(tl.float32)
            # 0 is not added where there is no key: -0 would become 0
            chains = tl.where(here, tl.fma(tl.broadcast_to(p[:, None], [4, BD]), v, chains), chains)
    # (chain 0 + chain 2) + (chain 1 + chain 3)
    total = tl.sum(tl.sum(tl.reshape(chains, [2, 2, BD]), 0), 0)
    o = tl.math.div_rn(total, tl.broadcast_to(sum_of_lanes(lanes), [BD]))
    tl.store(y + (row * H + head) * d + i, o, mask=i < d)


@triton.jit
def silu_kernel(gate_up, y, N, BK: tl.constexpr):
    """silu(gate) * up of [R, 2 N], where 16 gates and 16 ups alternate. Grid: rows, blocks of BK."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BK + tl.arange(0, BK)
    x = gate_up + row * 2 * N + i // 16 * 32 + i % 16
    g = tl.load(x, mask=i < N, other=0.0)
    u = tl.load(x + 16, mask=i < N, other=0.0)
    silu = tl.math.div_rn(g, exp(tl.minimum(g * -1.0, 88.0)) + 1.0)
    tl.store(y + row * N + i, silu * u, mask=i < N)
