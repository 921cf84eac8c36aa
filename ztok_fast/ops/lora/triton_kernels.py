"""Triton kernels of the LoRA linear layer, forward and backward.

    row_adapters_kernel   the adapter of each row, where adapters are given per sequence
    shrink_kernel         low_rank[m] = s x[m] Aᵀ, in float32                  (backward: s g[m] B)
    lora_linear_kernel    y = x Wᵀ + bias + low_rank Bᵀ, one accumulator       (backward: dx = g W + low_rank A)
    outer_kernel          per adapter the sum over its rows of low_rank[m] x[m] (dA, and dB with g[m])

The low-rank factor stays in float32 between two kernels: x Aᵀ may be too large for float16. For a half-precision
result the tensor cores take it back as two bfloat16 terms, 16 of its 24 bits and all of its range; a factor that is not
bfloat16 itself is split in the same way. For float32 they work by `tf32x3`.

Adapters never meet: where the rows of a tile use several, each adapter's product goes to an accumulator of its own and
is taken over by its rows with `where`. A tile whose rows agree adds it to the accumulator of the base product.

The number of rows is a run-time number that no code is specialised on. Under the interpreter (`UPCAST`), where bfloat16
arithmetic is wrong, everything is float32 after it is loaded.
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, EXACT: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b: operands of one half-precision dtype as they are, or (EXACT) as float32 in three tf32 products."""
    if EXACT or UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def terms_of(v):
    """float32 as the sum of two bfloat16; the second is 0 where the first is infinite or NaN and says it all."""
    high = v.to(tl.bfloat16)
    rest = v - high.to(tl.float32)
    return high, tl.where(rest == rest, rest, 0.0).to(tl.bfloat16)


@triton.jit
def low_rank_dot(u, b, acc, EXACT: tl.constexpr, UPCAST: tl.constexpr):
    """acc + u b with u in float32: as `dot` (EXACT), or in bfloat16 terms without the product of the two small ones."""
    if EXACT or UPCAST:
        return dot(u, b, acc, True, UPCAST)
    else:
        high, low = terms_of(u)
        if b.dtype == tl.bfloat16:
            return tl.dot(low, b, tl.dot(high, b, acc))
        else:
            b_high, b_low = terms_of(b.to(tl.float32))
            return tl.dot(low, b_high, tl.dot(high, b_low, tl.dot(high, b_high, acc)))


@triton.jit
def load_adapters(adapters, rows, n, SINGLE: tl.constexpr, BM: tl.constexpr):
    """Adapters of rows that exist; one that is out of range counts as none."""
    if SINGLE:
        return tl.zeros([BM], tl.int32)
    else:
        found = tl.load(adapters + rows)
        return tl.where(found < n, found, -1)


@triton.jit(do_not_specialize=["M", "sequences", "n"])
def row_adapters_kernel(adapters, cu_seqlens, out, M, sequences, n, BM: tl.constexpr):
    """out[m] = adapter of the sequence that holds row m, -1 for rows that the offsets do not cover."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    # The last sequence that begins at or before the row, by bisection of [low, high).
    low = tl.zeros([BM], tl.int32)
    high = tl.zeros([BM], tl.int32) + sequences
    some = (rows < M) & (high > 0)
    for _ in range(0, 31):
        middle = (low + high) // 2
        offset = tl.load(cu_seqlens + middle, mask=high - low > 1, other=0)
        low, high = tl.where((high - low > 1) & (offset <= rows), middle, low), tl.where(offset > rows, middle, high)
    begin = tl.load(cu_seqlens + low, mask=some, other=0)
    end = tl.load(cu_seqlens + low + 1, mask=some, other=0)
    inside = some & (rows >= begin) & (rows < end)
    adapter = tl.load(adapters + low, mask=inside, other=-1)
    tl.store(out + rows, tl.where(adapter < n, adapter, -1), mask=rows < M)


@triton.jit(do_not_specialize=["M", "n"])
def shrink_kernel(
    x, factor, scaling, adapters, low_rank, M, K, R, n, stride_x, stride_n, stride_r, stride_k,
    SINGLE: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """low_rank[m, r] = s sum_k x[m, k] factor[a, r, k] for the adapter a of row m; 0 without. Grid: rows, ranks."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    near = tl.minimum(rows, M - 1)  # rows past the end repeat the last one and are not stored
    used = load_adapters(adapters, near, n, SINGLE, BM)
    steps = tl.arange(0, BK)
    x_row = x + near.to(tl.int64)[:, None] * stride_x
    result = tl.zeros([BM, BR], tl.float32)
    adapter = tl.min(tl.where(used >= 0, used, n), 0)
    while adapter < n:
        factor_row = factor + adapter.to(tl.int64) * stride_n + ranks[None, :] * stride_r
        acc = tl.zeros([BM, BR], tl.float32)
        for step in range(0, tl.cdiv(K, BK)):
            k = step * BK + steps
            a = tl.load(x_row + k[None, :], mask=(k < K)[None, :], other=0.0)
            inside = (k < K)[:, None] & (ranks < R)[None, :]
            b = tl.load(factor_row + k.to(tl.int64)[:, None] * stride_k, mask=inside, other=0.0)
            acc = dot(a, b, acc, EXACT, UPCAST)
        result = tl.where((used == adapter)[:, None], acc * tl.load(scaling + adapter).to(tl.float32), result)
        adapter = tl.min(tl.where(used > adapter, used, n), 0)
    mask = (rows < M)[:, None] & (ranks < R)[None, :]
    tl.store(low_rank + rows.to(tl.int64)[:, None] * R + ranks[None, :], result, mask=mask)


@triton.jit
def add_low_rank(
    acc, low_rank, expand, near, cols, R, N, stride_r, stride_c,
    EXACT: tl.constexpr, UPCAST: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """acc[m, c] + sum_r low_rank[m, r] expand[r, c]."""
    for step in range(0, tl.cdiv(R, BR)):
        r = step * BR + tl.arange(0, BR)
        u = tl.load(low_rank + near.to(tl.int64)[:, None] * R + r[None, :], mask=(r < R)[None, :], other=0.0)
        at = r.to(tl.int64)[:, None] * stride_r + cols.to(tl.int64)[None, :] * stride_c
        b = tl.load(expand + at, mask=(r < R)[:, None] & (cols < N)[None, :], other=0.0)
        acc = low_rank_dot(u, b, acc, EXACT, UPCAST)
    return acc


@triton.jit(do_not_specialize=["M", "n"])
def lora_linear_kernel(
    x, weight, bias, low_rank, expand, adapters, y, M, N, K, R, n,
    stride_x, stride_k, stride_c, stride_expand_n, stride_expand_r, stride_expand_c,
    SINGLE: tl.constexpr, EVEN_K: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y[m, c] = sum_k x[m, k] weight[k, c] + bias[c] + sum_r low_rank[m, r] expand[adapter of m, r, c].

    `weight` and `expand` are read by their strides, so that one kernel serves the layer and its transpose. Grid: tiles,
    in groups of GROUP row blocks, so that blocks that run together share columns of the weight in L2.
    """
    row_blocks, col_blocks = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tile = tl.program_id(0)
    first = tile // (GROUP * col_blocks) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    within = tile % (GROUP * col_blocks)
    rows = (first + within % height) * BM + tl.arange(0, BM)
    cols = within // height * BN + tl.arange(0, BN)
    # Rows past the end repeat the last one and columns begin again, which needs no mask in the loop; none is stored.
    # The remainder, unlike a minimum, leaves neighbours neighbours, so that loads along the columns stay wide.
    near = tl.minimum(rows, M - 1)
    near_cols = cols % N

    steps = tl.arange(0, BK)
    a_at = x + near.to(tl.int64)[:, None] * stride_x + steps[None, :]
    b_at = weight + steps.to(tl.int64)[:, None] * stride_k + near_cols.to(tl.int64)[None, :] * stride_c
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(0, tl.cdiv(K, BK)):
        if EVEN_K:
            a = tl.load(a_at)
            b = tl.load(b_at)
        else:
            left = K - step * BK
            a = tl.load(a_at, mask=(steps < left)[None, :], other=0.0)
            b = tl.load(b_at, mask=(steps < left)[:, None], other=0.0)
        acc = dot(a, b, acc, EXACT, UPCAST)
        a_at += BK
        b_at += BK * stride_k

    if SINGLE:
        acc = add_low_rank(
            acc, low_rank, expand, near, cols, R, N, stride_expand_r, stride_expand_c, EXACT, UPCAST, BR
        )  # fmt: skip
    else:
        used = load_adapters(adapters, near, n, SINGLE, BM)
        adapter = tl.min(tl.where(used >= 0, used, n), 0)
        if tl.min(used, 0) == tl.max(used, 0):
            if adapter < n:
                base = expand + adapter.to(tl.int64) * stride_expand_n
                acc = add_low_rank(
                    acc, low_rank, base, near, cols, R, N, stride_expand_r, stride_expand_c, EXACT, UPCAST, BR
                )  # fmt: skip
        else:
            while adapter < n:
                base = expand + adapter.to(tl.int64) * stride_expand_n
                own = tl.zeros([BM, BN], tl.float32)
                own = add_low_rank(
                    own, low_rank, base, near, cols, R, N, stride_expand_r, stride_expand_c, EXACT, UPCAST, BR
                )  # fmt: skip
                acc = tl.where((used == adapter)[:, None], acc + own, acc)
                adapter = tl.min(tl.where(used > adapter, used, n), 0)

    if bias is not None:
        acc += tl.load(bias + near_cols).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * N + cols[None, :], acc.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "n", "chunks_per_part"])
def outer_kernel(
    low_rank, right, adapters, out, M, N, R, n, chunks_per_part,
    stride_right, stride_part, stride_n, stride_r, stride_c,
    SINGLE: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[part, a, r, c] = sum over the part's rows m of adapter a of low_rank[m, r] right[m, c].

    Grid: columns, ranks, adapters x parts. A part is some chunks of rows; chunks that an adapter has no row in are left
    out, which is most of them when the rows of a sequence share one.
    """
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    adapter, part = tl.program_id(2) % n, tl.program_id(2) // n
    near_cols = cols % N  # keeps loads wide
    acc = tl.zeros([BR, BN], tl.float32)
    for chunk in range(0, chunks_per_part):
        first = (part * chunks_per_part + chunk) * CHUNK
        all_rows = first + tl.arange(0, CHUNK)
        if SINGLE:
            some = first < M
        else:
            seen = tl.load(adapters + all_rows, mask=all_rows < M, other=-1)
            some = tl.max((seen == adapter).to(tl.int32), 0) > 0
        if some:
            for step in range(0, CHUNK // BM):
                rows = first + step * BM + tl.arange(0, BM)
                own = rows < M
                if not SINGLE:
                    own &= tl.load(adapters + rows, mask=own, other=-1) == adapter
                # Rows of others are not loaded: what they hold, NaN included, stays out of the sum.
                wide = rows.to(tl.int64)[:, None]
                u = tl.load(low_rank + wide * R + ranks[None, :], mask=own[:, None] & (ranks < R)[None, :], other=0.0)
                v = tl.load(right + wide * stride_right + near_cols[None, :], mask=own[:, None], other=0.0)
                acc = low_rank_dot(tl.trans(u), v, acc, EXACT, UPCAST)
    at = out + part.to(tl.int64) * stride_part + adapter.to(tl.int64) * stride_n
    at += ranks.to(tl.int64)[:, None] * stride_r + cols.to(tl.int64)[None, :] * stride_c
    tl.store(at, acc.to(out.dtype.element_ty), mask=(ranks < R)[:, None] & (cols < N)[None, :])
