"""The Triton kernels of the engine's passes against the numpy oracle, bit for bit; interpreted without a GPU."""

import numpy as np
import pytest
import torch

from tests.engine import oracle

pytest.importorskip("triton")

from ztok_fast.engine import triton as pieces  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F = np.float32


def numbers(*shape, seed=0, scale=1.0):
    """float32 of many sizes, and some zeros of both signs."""
    generator = np.random.default_rng(seed)
    x = (generator.standard_normal(shape) * np.exp2(generator.integers(-6, 4, shape)) * scale).astype(F)
    x[generator.random(shape) < 0.03] = 0.0
    x[generator.random(shape) < 0.03] = -0.0
    return x


def put(x):
    return torch.from_numpy(np.ascontiguousarray(x)).to(DEVICE)


def same_bits(got, expected):
    got, expected = got.cpu().numpy(), np.asarray(expected, F)
    assert got.shape == expected.shape and got.dtype == F
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), ~numbers)
    np.testing.assert_array_equal(got.view(np.int32)[numbers], expected.view(np.int32)[numbers])


@pytest.mark.parametrize("width", [16, 48, 528])
def test_norm(width):
    x, weight = numbers(4, width), numbers(width, seed=1)
    x[1] = 0
    x[2, 3] = np.nan
    same_bits(pieces.rms_norm(put(x), put(weight), 1e-5), oracle.rms_norm(x, weight, 1e-5))


def test_angles():
    positions = np.array([0, 1, 2, 7, 100, 4095, 123_456, 2**24 - 1])
    frequencies = np.concatenate([oracle.frequencies(24, 10000.0), [F(1e-30)]])
    sines, cosines = pieces.rotary_angles(put(positions), put(frequencies))
    expected = oracle.sin_cos(positions.astype(F)[:, None] * frequencies)
    same_bits(sines, expected[0])
    same_bits(cosines, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_norms", [False, True])
def test_rotated_queries_and_what_is_cached(with_norms, dtype):
    rows, heads, kv_heads, d, eps = 3, 4, 2, 48, 1e-6
    qkv, norms = numbers(rows, heads + 2 * kv_heads, d), numbers(2, d, seed=1)
    qkv[0, -1, :4] = [1e5, -1e5, 65519, 1e-7]  # beyond the range of float16, its largest, a subnormal one
    positions, inv_freq = np.array([0, 5, 17]), oracle.frequencies(d, 10000.0)
    slots, seen = np.array([1, 1, 0]), np.array([17, 18, 0])  # the last row is padding
    keys = torch.full((2, kv_heads, 2, d, 16), 7.0, dtype=dtype, device=DEVICE)
    values = torch.full((2, kv_heads, 32, d), 7.0, dtype=dtype, device=DEVICE)
    queries = pieces.rotate(
        put(qkv.reshape(rows, -1)),
        put(norms) if with_norms else None,
        pieces.rotary_angles(put(positions), put(inv_freq)),
        put(slots),
        put(seen),
        keys,
        values,
        eps,
    )
    kept = oracle.cached if dtype == torch.float16 else np.asarray
    q, k, v = qkv[:, :heads], qkv[:, heads:-kv_heads], qkv[:, -kv_heads:]
    if with_norms:
        q, k = oracle.rms_norm(q, norms[0], eps), oracle.rms_norm(k, norms[1], eps)
    same_bits(queries, oracle.rotary(q, positions, inv_freq))
    expected_keys, expected_values = torch.full_like(keys, 7), torch.full_like(values, 7)
    for row in (0, 1):
        expected_keys[1, :, 1, :, row] = put(kept(oracle.rotary(k, positions, inv_freq)[row]))
        expected_values[1, :, 16 + row] = put(kept(v[row]))
    same_bits(keys.float(), expected_keys.float().cpu().numpy())
    same_bits(values.float(), expected_values.float().cpu().numpy())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "dtype", "at_once"),
    [(4, 2, 16, torch.float32, None), (3, 1, 48, torch.float16, None), (2, 2, 16, torch.float32, 100)],
)
def test_attention(heads, kv_heads, d, dtype, at_once, monkeypatch):
    """Two slots, rows that see 1 to 141 keys; the second time the rows attend in turn."""
    if at_once:
        monkeypatch.setattr(pieces, "SCORES_AT_ONCE", at_once)
    capacity = 144
    slots, seen = np.array([1, 0, 1, 0, 0]), np.array([1, 130, 141, 19, 0])
    queries = numbers(len(slots), heads, d)
    cached = [put(numbers(2, capacity, kv_heads, d, seed=seed)).to(dtype) for seed in (1, 2)]
    keys, values = (tensor.transpose(1, 2).contiguous() for tensor in cached)
    keys = keys.view(2, kv_heads, capacity // 16, 16, d).transpose(3, 4).contiguous()
    scale = 1 / d**0.5
    got = pieces.attention(put(queries), keys, values, put(slots), put(seen), 141, scale)
    for row, (slot, n) in enumerate(zip(slots[:-1], seen[:-1])):
        k, v = (tensor[slot, :n].float().cpu().numpy() for tensor in cached)
        same_bits(got[row].view(heads, d), oracle.attention(queries[row : row + 1], k, v)[0])


def test_a_score_that_is_not_a_number_gives_nothing_else():
    d = 16
    keys, values = torch.zeros(1, 1, 1, d, 16, device=DEVICE), torch.zeros(1, 1, 16, d, device=DEVICE)
    keys[0, 0, 0, 0, 2] = torch.nan
    slots, seen = (torch.tensor(v, device=DEVICE) for v in ([0, 0], [3, 2]))
    got = pieces.attention(torch.ones(2, 1, d, device=DEVICE), keys, values, slots, seen, 3, 0.25)
    assert got[0].isnan().all() and (got[1] == 0).all()


def test_gated():
    gate, up = numbers(3, 528, scale=4), numbers(3, 528, seed=1)
    gate[0, :4] = [-200, -88, 88, 200]
    gate[1, 0] = np.nan
    interleaved = np.stack([gate.reshape(3, -1, 16), up.reshape(3, -1, 16)], 2).reshape(3, -1)
    same_bits(pieces.gated(put(interleaved)), oracle.silu(gate) * up)
