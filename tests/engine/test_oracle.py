"""The oracle itself: its parts against exact rational arithmetic, the whole of it against transformers in float32."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine import oracle
from tests.engine.models import FAMILIES, oracle_of, random_model

F = np.float32
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
bits = (
    st.integers(0, 2**32 - 1)
    .filter(lambda b: (b >> 23) & 255 != 255)
    .map(lambda b: struct.unpack("f", struct.pack("I", b))[0])
)


def nearest(value: Fraction) -> float:
    """The binary32 number nearest to a rational one, ties to even; overflow is infinite."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value.numerator)) - math.log2(value.denominator)), -126)
    exponent += abs(value) >= Fraction(2) ** (exponent + 1)
    exponent -= abs(value) < Fraction(2) ** exponent and exponent > -126
    step = Fraction(2) ** (exponent - 23)
    rounded = round(value / step) * step  # Fraction rounds halves to even
    return math.inf * (1 if value > 0 else -1) if abs(rounded) >= 2**128 else float(rounded)


def check_fma(a, b, c):
    got = float(oracle.fma(F(a), F(b), F(c)))
    assert got == nearest(Fraction(a) * Fraction(b) + Fraction(c)), (a, b, c, got)


@settings(max_examples=600, deadline=None)
@given(a=st.one_of(floats, bits), b=st.one_of(floats, bits), c=st.one_of(floats, bits))
def test_fma_rounds_once(a, b, c):
    check_fma(a, b, c)


@settings(max_examples=600, deadline=None)
@given(a=floats, b=floats, ulps=st.integers(-3, 3), shift=st.integers(-60, 60), sign=st.sampled_from((1, -1)))
def test_fma_where_sums_cancel_or_lie_half_way(a, b, ulps, shift, sign):
    """c near the product, and near the product times powers of two: there a double rounding shows."""
    with np.errstate(over="ignore"):
        c = F(a) * F(b)
        c = np.ldexp(c, shift) * F(sign)
        for _ in range(abs(ulps)):
            c = np.nextafter(c, F(math.copysign(math.inf, ulps)))
    if np.isfinite(c):
        check_fma(a, b, float(c))


def test_fma_where_adding_in_binary64_is_wrong():
    """The product is half of the last place of c less 2^-70 or more: in binary64 that looks like a tie."""
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(500):
        k = int(random.integers(1, 64))
        a, b = F(1 + k * 2.0**-23), F(2.0**-24 * (1 - k * 2.0**-23))
        c = F(1 + random.integers(0, 2**23) * 2.0**-23)
        for sign in (F(1), F(-1)):
            check_fma(float(a), float(sign * b), float(sign * c))
        twice = F(float(a) * float(b) + float(c))
        wrong += twice != oracle.fma(a, b, c)
    assert wrong > 100


def test_fma_of_what_is_not_finite():
    inf, nan = F(np.inf), F(np.nan)
    assert oracle.fma(inf, F(1), F(2)) == inf and oracle.fma(F(3e38), F(10), F(0)) == inf
    for a, b, c in ((inf, F(0), F(1)), (inf, F(1), -inf), (nan, F(1), F(1))):
        assert np.isnan(oracle.fma(a, b, c))


def test_exp_and_silu_are_close():
    x = np.linspace(-87, 88, 4001, dtype=F)
    np.testing.assert_allclose(oracle.exp(x), np.exp(x.astype(np.float64)), rtol=2e-7)
    assert oracle.exp(F(-87.001)) == 0 and oracle.exp(F(0)) == 1
    g = np.linspace(-100, 100, 2001, dtype=F)
    wide = g.astype(np.float64)
    np.testing.assert_allclose(oracle.silu(g), wide / (1 + np.exp(-np.maximum(wide, -88))), rtol=4e-7)


def test_sin_and_cos_are_correctly_rounded_nearly_always():
    x = np.abs(np.random.default_rng(1).standard_normal(2000) * 3000).astype(F)
    sine, cosine = oracle.sin_cos(x)
    for got, exact in ((sine, np.sin(x.astype(np.float64))), (cosine, np.cos(x.astype(np.float64)))):
        assert (got == exact.astype(F)).mean() > 0.999
        np.testing.assert_allclose(got, exact, rtol=2e-7)


def test_sums_in_lanes():
    values = np.random.default_rng(2).standard_normal((3, 37)).astype(F)
    lanes = [[F(0)] * 16 for _ in range(3)]
    for row in range(3):
        for i in range(37):
            lanes[row][i % 16] = lanes[row][i % 16] + values[row, i]
        for h in (8, 4, 2, 1):
            for lane in range(h):
                lanes[row][lane] = lanes[row][lane] + lanes[row][lane + h]
    assert oracle.sum_lanes(values).tolist() == [float(row[0]) for row in lanes]


def test_quantise_edges():
    q, scale = oracle.quantise(np.array([[0, 0], [2.0**-101, 0], [1, -0.5], [np.inf, 1], [np.nan, 1]], F))
    assert q.tolist() == [[0, 0], [0, 0], [127, -64], [0, 0], [0, 0]]
    assert scale[:3].tolist() == [0, 0, float(F(1) / F(127))] and np.isnan(scale[3:]).all()


def test_philox_is_the_one_of_the_z_head():
    from ztok_fast.ops.zhead.philox import philox_4x32

    counter = (1, 2**32 - 1, 12345, 2**31 + 7)
    expected = philox_4x32(tuple(torch.tensor([word]) for word in counter), (77, 2**32 - 5))
    assert list(oracle.philox(counter, (77, 2**32 - 5))) == [int(word) for word in expected]


def test_samples_follow_the_softmax():
    logits = np.array([0, 1, 2, -1], F)
    drawn = [oracle.sample(logits, 0.7, 1.0, 5, row, 3) for row in range(3000)]
    expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 3000, expected, atol=0.03)
    assert {oracle.sample(logits, 0.7, 0.75, 5, row, 3) for row in range(50)} == {2}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_computes_what_transformers_does(family):
    model = random_model(family, seed=3)
    tokens = torch.randint(0, model.config.vocab_size, (9,), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([0, 1, 2, 5, 6, 7, 20, 21, 22])
    with torch.no_grad():
        hidden = model.model(tokens[None], position_ids=positions[None]).last_hidden_state[0]
        logits = model.lm_head(hidden)
    for precision, tolerance in (("float32", 1e-4), ("int8", 0.2)):
        ours = oracle_of(model, precision)
        got = ours.forward(tokens.numpy(), positions=positions.numpy())
        for value, expected in ((got, hidden.numpy()), (ours.logits(got), logits.numpy())):
            error = np.linalg.norm(value - expected) / np.linalg.norm(expected)
            assert error < tolerance, (precision, error)


def test_the_oracle_folds_adapters_as_peft_adds_them():
    model = random_model("llama", seed=4, adapters=("first", "second"))
    tokens = torch.arange(7)
    for name in ("first", "second"):
        model.set_adapter(name)
        with torch.no_grad():
            expected = model(tokens[None]).logits[0].numpy()
        ours = oracle_of(model, "float32", name)
        np.testing.assert_allclose(ours.logits(ours.forward(tokens.numpy())), expected, rtol=1e-3, atol=1e-3)
