"""Intervals of tokens: the same integers everywhere, close to the probabilities that they stand for."""

import ctypes
import ctypes.util
import importlib.util
import json
import os
import platform
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.entropy_cases import adversarial, bits_of, draws, instruction_set, realistic
from ztok_fast import native, ops
from ztok_fast.ops import arithmetic
from ztok_fast.ops.entropy import reference

ROOT = Path(__file__).resolve().parents[2]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


def to_float32(value: Fraction) -> float:
    """Rounded once, to nearest even, by integers."""
    if value == 0:
        return 0.0
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - 23, -149)
    return float(round(value / unit) * unit)  # round() of a Fraction takes ties to even


def fma(a, b, c):
    return to_float32(Fraction(a) * Fraction(b) + Fraction(c))


def count_by_fractions(x: float) -> int:
    """1 + rint(exp(x) * 2^30) with the exp of docs/determinism.md, each operation exact and then rounded."""
    if x < -87:
        return 1
    constants = "1.44269504 -0.693359375 2.12194440e-4 1.9875691500e-4 1.3981999507e-3 8.3334519073e-3 4.1665795894e-2"
    log2e, high, low, *rest = (float(np.float32(c)) for c in f"{constants} 1.6666665459e-1 5.0000001201e-1".split())
    n = to_float32(Fraction(fma(x, log2e, 12582912.0)) - 12582912)
    r = fma(n, low, fma(n, high, x))
    p = rest[0]
    for coefficient in rest[1:]:
        p = fma(p, r, coefficient)
    square = to_float32(Fraction(r) * Fraction(r))
    e = to_float32(Fraction(fma(p, square, r)) + 1)
    return 1 + round(Fraction(e) * Fraction(2) ** int(n) * 2**30)


@given(FLOATS, FLOATS, FLOATS)
@settings(max_examples=300, deadline=None)
def test_fma_of_the_reference_rounds_once(a, b, c):
    got = arithmetic.fma(*(torch.tensor([v], dtype=torch.float32) for v in (a, b, c))).item()
    assert got == fma(a, b, c)


def test_fma_where_rounding_twice_is_wrong():
    a, c = 1 + 2.0**-12, 2.0**-60
    b = 1 + 2.0**-12  # the product 1 + 2^-11 + 2^-24 lies between two floats; c decides
    results = [arithmetic.fma(*(torch.tensor([v]) for v in (a, b, s * c))).item() for s in (-1, 0, 1)]
    assert results == [fma(a, b, -c), fma(a, b, 0), fma(a, b, c)]
    assert results[0] == results[1] < results[2]


@pytest.mark.op("token_intervals")
def test_counts_are_those_of_exact_arithmetic(backend, device):
    """Each against 0, the largest: sizes are counts."""
    generator = torch.Generator().manual_seed(0)
    x = -torch.rand(400, generator=generator) * 40
    ends = torch.tensor([-0.0, -1e-45, -1e-30, -86.999, -87.0, -87.00001, -20.8, -21.5, -22.0, -3e38, -0.34657359])
    x = torch.cat([x, ends])
    logits = torch.stack([torch.zeros_like(x), x], 1).to(device)
    start, size, total = ops.token_intervals(logits, torch.ones(len(x), dtype=torch.int32, device=device))
    expected = [count_by_fractions(value) for value in x.tolist()]
    assert size.tolist() == expected
    assert start.tolist() == [2**30 + 1] * len(x)
    assert total.tolist() == [2**30 + 1 + count for count in expected]


@pytest.mark.op("token_intervals")
@pytest.mark.parametrize("size", [1, 2, 3, 17, 40])
def test_intervals_of_all_tokens_tile_the_total(backend, device, size):
    for name, row in adversarial(size, torch.Generator().manual_seed(1)).items():
        found = ops.token_intervals(row.to(device).expand(size, size), torch.arange(size, device=device))
        assert int(found.size.min()) >= 1, name
        ends = (found.start + found.size).tolist()
        assert found.start.tolist() == [0, *ends[:-1]], name
        assert found.total.tolist() == [ends[-1]] * size, name


def samples(size, generator):
    rows = torch.stack([*adversarial(size, generator).values()])
    return rows, torch.randint(0, size, (len(rows),), generator=generator)


@pytest.mark.op("token_intervals")
@pytest.mark.parametrize("size", [2047, 2048, 49152])
def test_the_same_integers_as_the_reference(backend, device, size):
    logits, targets = samples(size, torch.Generator().manual_seed(2))
    found = ops.token_intervals(logits.to(device), targets.to(device))
    for got, wanted in zip(found, reference.token_intervals(logits, targets)):
        assert torch.equal(got.cpu(), wanted)


@pytest.mark.op("token_intervals")
def test_the_same_integers_whatever_the_batch_and_the_strides(backend, device):
    logits, targets = samples(330, torch.Generator().manual_seed(3))
    logits, targets = logits.to(device), targets.to(device)
    whole = ops.token_intervals(logits, targets)
    for layout in (torch.nn.functional.pad(logits, (0, 7))[:, :330], logits.T.contiguous().T):
        assert all(torch.equal(a, b) for a, b in zip(whole, ops.token_intervals(layout, targets)))
    for i in range(len(targets)):
        row = ops.token_intervals(logits[i : i + 1], targets[i : i + 1])
        assert [int(v) for v in row] == [int(v[i]) for v in whole]


@pytest.mark.parametrize("isa", [0, 1, 2])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_same_integers_on_every_instruction_set_and_number_of_threads(isa, threads):
    logits, targets = samples(5001, torch.Generator().manual_seed(4))
    logits, targets = logits.repeat(5, 1), targets.repeat(5)
    expected = reference.token_intervals(logits, targets)
    streams = ops.range_encode(*expected, torch.arange(len(targets) + 1))
    state = ops.range_decoder(*streams)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with instruction_set(isa) as present, ops.backend("cpp"):
            if not present:
                pytest.skip("this processor has no such instruction set")
            found = ops.token_intervals(logits, targets)
            decoded = ops.decode_tokens(logits, state, streams.data)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert torch.equal(decoded.tokens, targets)
    assert torch.equal(decoded.state, reference.decode_tokens(logits, state, streams.data)[1])


UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())


@pytest.mark.skipif(not native.status("cpu").available, reason="no compiled CPU library")
@pytest.mark.skipif(UPWARD is None or not ctypes.util.find_library("m"), reason="how to round upward is not known here")
def test_the_same_integers_whatever_the_mode_of_the_thread():
    logits, targets = samples(5001, torch.Generator().manual_seed(4))
    rounding = ctypes.CDLL(ctypes.util.find_library("m"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ops.backend("cpp"):
            expected = ops.token_intervals(logits, targets)
            streams = ops.range_encode(*expected, torch.arange(len(targets) + 1))
            state = ops.range_decoder(*streams)
            assert torch.set_flush_denormal(True) and rounding.fesetround(UPWARD) == 0
            found = ops.token_intervals(logits, targets)
            decoded = ops.decode_tokens(logits, state, streams.data)
            assert rounding.fegetround() == UPWARD  # the mode of the thread is as it was
    finally:
        torch.set_flush_denormal(False)
        rounding.fesetround(0)
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert torch.equal(decoded.tokens, targets)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the package triton is not installed")
def test_what_a_gpu_runs_is_rounded_as_it_is_written():
    """Without a GPU: no operation of the compiled kernel is approximate, flushes subnormals or may be fused."""
    command = [sys.executable, "-m", "tests.ops.aot", "90", "token_intervals"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    report = json.loads(result.stdout)
    assert set(report["arithmetic"]) == {f"{name}.rn.f32" for name in ("fma", "add", "sub", "mul")}


@pytest.mark.parametrize("size", [2048, 49152])
@pytest.mark.parametrize("noise", [0.0, 2.0, 6.0])
def test_overhead_is_below_a_hundredth_of_a_bit_per_token(size, noise):
    """Of drawn tokens, against -log2 of the probabilities in float64, with the bytes of the streams and their ends."""
    generator = torch.Generator().manual_seed(5)
    tokens = 200_000 // size * 8
    logits = realistic(tokens, size, generator, noise=noise)
    targets = draws(logits, generator)
    exact = bits_of(logits, targets)
    found = ops.token_intervals(logits, targets)
    ideal = torch.log2(found.total.double()) - torch.log2(found.size.double())
    assert float((ideal - exact).max()) < size / 2**28
    streams = ops.range_encode(*found, torch.tensor([0, tokens]))
    assert 8 * int(streams.cu_bytes[-1]) <= float(exact.sum()) + 0.01 * tokens + 16


@pytest.mark.parametrize("size", [2048, 49152, 262144])
def test_overhead_of_equal_logits(size):
    """The total is largest, and the share of the range narrowest."""
    logits, targets = torch.zeros(64, size), torch.arange(64) * (size // 64)
    streams = ops.range_encode(*ops.token_intervals(logits, targets), torch.tensor([0, 64]))
    assert 8 * int(streams.cu_bytes[-1]) <= 64 * (np.log2(size) + 0.01) + 16


def test_the_least_probable_token_has_one_count():
    logits = torch.full((1, 49152), -1e30)
    logits[0, 7] = 1e30
    _, size, total = ops.token_intervals(logits, torch.tensor([100]))
    assert int(size) == 1 and int(total) == 2**30 + 49152


@pytest.mark.op("token_intervals")
def test_values_that_are_refused(backend, device):
    if device == "cuda":
        pytest.skip("values are not checked on a GPU")
    logits, targets = torch.zeros(3, 40), torch.tensor([0, 39, 5])
    for value in (float("nan"), float("inf"), -float("inf")):
        for row, token in ((0, 0), (1, 31), (2, 39)):
            bad = logits.clone()
            bad[row, token] = value
            with pytest.raises(ValueError, match="token_intervals: logits must be finite"):
                ops.token_intervals(bad, targets)
    for value in (-1, 40):
        with pytest.raises(ValueError, match=rf"token_intervals: targets must be in \[0, 40\), got {value}"):
            ops.token_intervals(logits, torch.tensor([0, value, 5]))


def test_arguments_that_are_refused():
    logits, targets = torch.zeros(3, 40), torch.zeros(3, dtype=torch.int64)
    for bad, message in (
        ((logits.double(), targets), "of dtype float32"),
        ((logits[0], targets), r"a tensor \[T, V\]"),
        ((logits[:, :0], targets), "1 to 500,000 columns"),
        ((torch.zeros(1, 1).expand(3, 500_001), targets), "1 to 500,000 columns"),
        ((logits, targets[:2]), "of size 3"),
        ((logits, targets.float()), "of dtype int32, int64"),
    ):
        with pytest.raises(ValueError, match=f"token_intervals: (logits|targets) must be .*{message}"):
            ops.token_intervals(*bad)
