"""The arithmetic of docs/determinism.md in numpy: an independent implementation that the engine is compared with.

It takes plain arrays under the names of a Hugging Face state dictionary, reads whole sequences without a cache, and is
vectorised over rows, heads and outputs; every sum runs in the order of the document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import mpmath
import numpy as np

F, D = np.float32, np.float64


def fma(a, b, c):
    """a * b + c in binary32, rounded once.

    The product of two 24-bit numbers is exact in binary64. The sum is rounded to odd there (the last bit is set where
    it is not exact), and 53 bits are enough that rounding it again, to 24, gives what one rounding gives.
    """
    c = np.asarray(c, D)
    with np.errstate(invalid="ignore", over="ignore"):
        product = np.multiply(a, b, dtype=D)
        total = np.asarray(product + c)
        part = total - product
        error = (product - (total - part)) + (c - part)  # Knuth's two-sum: exact
        bits = total.view(np.int64)
        away = (error > 0) == (total > 0)
        inexact = np.isfinite(total) & (error != 0) & (bits % 2 == 0)
        odd = np.where(inexact, bits + np.where(away, 1, -1), bits).view(D)
        return odd.astype(F)


def sum_lanes(values):
    """The sum in 16 lanes over the last axis: [..., n] -> [...]."""
    n = values.shape[-1]
    lanes = np.zeros((*values.shape[:-1], 16), F)
    for i in range(n):
        lanes[..., i % 16] += values[..., i]
    return fold_lanes(lanes)


def fold_lanes(lanes):
    for h in (8, 4, 2, 1):
        lanes = lanes[..., :h] + lanes[..., h : 2 * h]
    return lanes[..., 0]


def exp(x):
    x = np.asarray(x, F)
    safe = np.where(x < F(-87), F(0), x)
    n = fma(safe, F(1.44269504), F(12582912)) - F(12582912)
    r = fma(n, F(-0.693359375), safe)
    r = fma(n, F(2.12194440e-4), r)
    p = F(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, F(c))
    y = fma(p, r * r, r) + F(1)
    with np.errstate(invalid="ignore"):
        power = (np.where(np.isfinite(n), n, 0).astype(np.int32) + 127) << 23
    return np.where(x < F(-87), F(0), y * power.astype(np.int32).view(F))


def silu(g):
    return g / (F(1) + exp(np.minimum(-g, F(88))))


_S = (
    -1.66666666666666324348e-01,
    8.33333333332248946124e-03,
    -1.98412698298579493134e-04,
    2.75573137070700676789e-06,
    -2.50507602534068634195e-08,
    1.58969099521155010221e-10,
)
_C = (
    4.16666666666666019037e-02,
    -1.38888888888741095749e-03,
    2.48015872894767294178e-05,
    -2.75573143513906633035e-07,
    2.08757232129817482790e-09,
    -1.13596475577881948265e-11,
)


def sin_cos(x):
    x = np.asarray(x, D)
    k = np.rint(x * 0.63661977236758134308)
    r = ((x - k * 1.57079632673412561417e00) - k * 6.07710050630396597660e-11) - k * 2.02226624879595063154e-21
    z = r * r
    s = r + (r * z) * _horner(z, _S)
    c = (1 - z * 0.5) + (z * z) * _horner(z, _C)
    turn = k.astype(np.int64) % 4
    sine = np.choose(turn, [s, c, -s, -c])
    cosine = np.choose(turn, [c, -s, -c, s])
    return sine.astype(F), cosine.astype(F)


def _horner(z, coefficients):
    result = np.full_like(z, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        result = c + z * result
    return result


def quantise(x):
    """Rows [..., K] -> int64 [..., K] and float32 scales [...]."""
    x = np.asarray(x, F)
    a = np.abs(x).max(-1)
    usable = np.isfinite(a) & (a >= F(2.0**-100))
    safe = np.where(usable, a, F(1))
    q = np.rint(np.where(usable[..., None], x, F(0)) * (F(127) / safe)[..., None]).astype(np.int64)
    scale = np.where(usable, safe / F(127), np.where(a < F(2.0**-100), F(0), F(np.nan)))
    return q, scale.astype(F)


def fold_lora(weight, A, B, scale):
    product = np.zeros(weight.shape, F)
    for j in range(A.shape[0]):
        product = fma(B[:, j : j + 1], A[j][None], product)
    return weight + F(scale) * product


def int8_linear(x, q_weight, scale_weight, bias=None):
    q, scale = quantise(x)
    sums = (q @ q_weight.T).astype(F)  # below 2^31, so exact in int64; one rounding
    y = (sums * scale_weight) * scale[..., None]
    return y if bias is None else y + bias


def ordered_linear(x, weight, bias=None):
    y = np.zeros((*x.shape[:-1], weight.shape[0]), F)
    for k in range(weight.shape[1]):
        y = fma(x[..., k : k + 1], weight[:, k], y)
    return y if bias is None else y + bias


def rms_norm(x, weight, eps):
    lanes = np.zeros((*x.shape[:-1], 16), F)
    for i in range(x.shape[-1]):
        lanes[..., i % 16] = fma(x[..., i], x[..., i], lanes[..., i % 16])
    mean = fold_lanes(lanes) / F(x.shape[-1])
    return (x * (F(1) / np.sqrt(mean + F(eps)))[..., None]) * weight


def frequencies(width, base):
    """base^(-2i/width) rounded once to 24 bits; by mpmath, where the engine uses `decimal`."""
    result = []
    for i in range(width // 2):
        with mpmath.workprec(300):
            exact = mpmath.mpf(base) ** (mpmath.mpf(-2 * i) / width)
        with mpmath.workprec(24):
            result.append(F(float(+exact)))
    return np.array(result, F)


def rotary(x, positions, inv_freq):
    """x [T, heads, d]."""
    sine, cosine = sin_cos(positions.astype(F)[:, None] * inv_freq)
    sine, cosine = sine[:, None], cosine[:, None]
    h = x.shape[-1] // 2
    low, high = x[..., :h], x[..., h:]
    return np.concatenate([fma(low, cosine, -(high * sine)), fma(high, cosine, low * sine)], -1)


def cached(x):
    """Keys or values as the cache of an int8 model keeps them."""
    return np.clip(x, F(-65504), F(65504)).astype(np.float16).astype(F)


def attention(q, k, v):
    """Causal attention of the last T rows of a sequence: q [T, H, d], k and v [S, KV, d] -> [T, H, d]."""
    rows, heads, width = q.shape
    cached = len(k)
    k, v = (np.repeat(t, heads // t.shape[1], 1) for t in (k, v))
    s = np.zeros((rows, heads, cached), F)
    for i in range(width):
        s = fma(q[:, :, i, None], k[:, :, i].T[None], s)
    s = s * F(1 / math.sqrt(width))
    seen = np.tril(np.ones((rows, cached), bool), cached - rows)[:, None]
    m = np.where(seen, s, F(-np.inf)).max(-1)
    p = np.where(seen, exp(np.where(seen, s - m[..., None], F(0))), F(0))
    total = sum_lanes(p)
    chains = np.zeros((4, rows, heads, width), F)
    for j in range(cached):
        added = fma(p[:, :, j, None], v[None, j], chains[j % 4])
        chains[j % 4] = np.where(seen[:, :, j, None], added, chains[j % 4])
    return ((chains[0] + chains[2]) + (chains[1] + chains[3])) / total[..., None]


@dataclass
class Oracle:
    """One model, under one adapter or none.

    Args:
        weights: arrays by their names in the model's state dictionary.
        lora: (A, B, scale) by the name of the weight that it is folded into.
    """

    weights: dict[str, np.ndarray]
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    eps: float
    inv_freq: np.ndarray
    precision: str = "int8"
    lora: dict[str, tuple[np.ndarray, np.ndarray, float]] = field(default_factory=dict)
    _quantised: dict = field(default_factory=dict)

    def folded(self, name):
        weight = self.weights[name]
        return fold_lora(weight, *self.lora[name]) if name in self.lora else weight

    def linear(self, name, x):
        bias = self.weights.get(f"{name}.bias")
        weight = f"{name}.weight"
        if weight not in self._quantised:
            folded = self.folded(weight)
            self._quantised[weight] = quantise(folded) if self.precision == "int8" else (folded,)
        apply = int8_linear if self.precision == "int8" else ordered_linear
        return apply(x, *self._quantised[weight], bias)

    def inputs(self, tokens, vectors=None):
        """Input rows [T, D] of token ids, -1 for none, plus vectors where there are some."""
        table = self.weights["model.embed_tokens.weight"]
        tokens = np.asarray(tokens)
        rows = np.where((tokens >= 0)[:, None], table[np.maximum(tokens, 0)], F(0))
        return rows if vectors is None else rows + vectors

    def forward(self, tokens, vectors=None, positions=None, layers=None):
        """Hidden states [T, D] of one whole sequence, after the final norm."""
        x = self.inputs(tokens, vectors)
        positions = np.arange(len(x)) if positions is None else np.asarray(positions)
        for index in range(self.layers if layers is None else layers):
            x = self._layer(f"model.layers.{index}.", x, positions)
        return rms_norm(x, self.weights["model.norm.weight"], self.eps)

    def _layer(self, name, x, positions):
        h = rms_norm(x, self.weights[name + "input_layernorm.weight"], self.eps)
        q, k, v = (
            self.linear(f"{name}self_attn.{part}_proj", h).reshape(len(x), heads, self.head_width)
            for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
        )
        if name + "self_attn.q_norm.weight" in self.weights:
            q = rms_norm(q, self.weights[name + "self_attn.q_norm.weight"], self.eps)
            k = rms_norm(k, self.weights[name + "self_attn.k_norm.weight"], self.eps)
        q, k = (rotary(t, positions, self.inv_freq) for t in (q, k))
        if self.precision == "int8":
            k, v = (cached(t) for t in (k, v))
        x = x + self.linear(name + "self_attn.o_proj", attention(q, k, v).reshape(len(x), -1))
        h = rms_norm(x, self.weights[name + "post_attention_layernorm.weight"], self.eps)
        g, u = self.linear(name + "mlp.gate_proj", h), self.linear(name + "mlp.up_proj", h)
        return x + self.linear(name + "mlp.down_proj", silu(g) * u)

    def logits(self, hidden, bias=None):
        return self.linear("lm_head", hidden if bias is None else hidden + bias)


def philox(counter, key):
    """Four 32-bit words of Philox4x32-10, in Python integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (second >> 32) ^ b ^ k0, second & 0xFFFFFFFF, (first >> 32) ^ d ^ k1, first & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


def random_bits(seed, row_id, step):
    """The 64 random bits of a draw."""
    seed, row_id = seed % 2**64, row_id % 2**64
    low = 0xFFFFFFFF
    words = philox((0, row_id & low, row_id >> 32, step & low), (seed & low, seed >> 32))
    return words[0] | words[1] << 32


def sample(logits, temperature, top_p, seed, row_id, step):
    """The token drawn from the logits [V] of one row."""
    z = logits / F(temperature)
    weights = np.rint(exp(z - z.max()).astype(D) * 2.0**30).astype(np.int64).tolist()
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    least = D(top_p) * D(sum(weights))
    kept, total = [], 0
    for token in order:
        kept.append(token)
        total += weights[token]
        if total >= least:
            break
    draw = random_bits(seed, row_id, step) * total >> 64
    for token in kept:
        draw -= weights[token]
        if draw < 0:
            return token
    raise AssertionError("the draw is below the sum")


def choose(logits, temperature, top_p, seed, row_id, step):
    """One choice from the logits [n] of one row."""
    return int(logits.argmax()) if temperature == 0 else sample(logits, temperature, top_p, seed, row_id, step)


def gap_of_slot(hidden, weight, bias, longest, allow_end, temperature, top_p, seed, row_id, step):
    """The gap before the next slot of one row [D], and 1 where end-of-Z was drawn or else its probability."""
    logits = ordered_linear(hidden, weight) + bias
    logits = np.concatenate([logits[:longest], logits[-1:]])
    weights = np.rint(exp(logits - logits.max()).astype(D) * 2.0**30).astype(np.int64)
    if not allow_end:
        end, logits = D(weights[-1]) / D(weights.sum()), logits[:-1]
    gap = choose(logits, temperature, top_p, seed, row_id, 2 * step)
    if allow_end:
        end, gap = float(gap == longest), gap if gap < longest else 0
    return gap, end
