"""The Z head over every backend present: what `test_every_op.py` does not ask of it."""

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ztok_fast import ops
from ztok_fast.ops import backends
from ztok_fast.ops.zhead import reference
from ztok_fast.ops.zhead.philox import philox_4x32
from ztok_fast.ops.zhead.z_select import Z_SELECT

MASK = 0xFFFFFFFF
# Known answers: (counter, key, output), from the authors' own test vectors for Philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# 99.99 % quantile of the chi-square distribution by degrees of freedom
CHI_SQUARE_LIMIT = {3: 21.11, 4: 23.51, 7: 29.88}


def philox_by_integers(counter, key):
    """The generator in exact Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK, (a >> 32) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return tuple(c)


def gumbel(seed, row_id, step, code):
    row_bits = row_id & (2**64 - 1)
    words = philox_by_integers((code // 4, row_bits & MASK, row_bits >> 32, step), (seed & MASK, seed >> 32))
    return -math.log(-math.log1p(-(words[code % 4] + 0.5) / 2**32))


def nucleus(logits, temperature, top_p):
    """Codes of the smallest set that reaches top_p, by a loop over float64 probabilities."""
    probabilities = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0).tolist()
    chosen, mass = [], 0.0
    for code in sorted(range(len(logits)), key=lambda code: (-probabilities[code], code)):
        if mass >= top_p:
            break
        chosen.append(code)
        mass += probabilities[code]
    return chosen


def select_by_loop(hidden, rows, temperature, top_p, seed, row_ids, step):
    codes = []
    for b in range(hidden.shape[0]):
        logits = (rows.double() @ hidden[b].double()).tolist()
        if temperature == 0:
            codes.append(max(range(len(logits)), key=lambda code: (logits[code], -code)))
            continue
        codes.append(
            max(
                nucleus(logits, temperature, top_p),
                key=lambda code: logits[code] / temperature + gumbel(seed, int(row_ids[b]), step, code),
            )
        )
    return codes


def takes_top_p(backend):
    """Whether a backend samples with top_p below 1; the others have a condition that says that they do not."""
    return next(b for b in Z_SELECT.backends if b.name == backend).condition is None


def number_of_draws(backend):
    """Fewer in Triton's interpreter, which takes milliseconds for each."""
    return 400 if backend == "triton" and backends.triton_is_interpreted() else 20_000


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    words = philox_4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected
    assert philox_by_integers(counter, key) == expected


@pytest.mark.op("z_select")
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(0, 4),
    num_codes=st.integers(1, 11),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.9, 0.4, 1e-6]),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    first_id=st.integers(-(2**63), 2**63 - 5),
)
def test_equals_loop(backend, device, batch, num_codes, temperature, top_p, seed, step, first_id):
    assume(takes_top_p(backend) or top_p == 1 or temperature == 0)
    hidden, rows = torch.randn(batch, 3, device=device), torch.randn(num_codes, 3, device=device)
    row_ids = torch.tensor([first_id + b for b in range(batch)], dtype=torch.int64, device=device)
    codes, log_probs = ops.z_select(hidden, rows, temperature, top_p, seed, row_ids, step)
    expected = select_by_loop(hidden.cpu(), rows.cpu(), temperature, top_p, seed, row_ids, step)
    assert codes.dtype == torch.int32 and log_probs.dtype == torch.float32
    assert codes.tolist() == expected
    exact = (hidden.double() @ rows.double().T).log_softmax(-1).gather(-1, codes.long()[:, None])[:, 0]
    torch.testing.assert_close(log_probs, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.op("z_select")
@pytest.mark.parametrize("num_codes", [2, 7, 65, 300])
def test_of_equal_logits_the_lowest_code(backend, device, num_codes):
    hidden = torch.randn(40, 19, device=device)
    one_row = torch.randn(1, 19, device=device)
    assert not ops.z_select(hidden, one_row.expand(num_codes, -1)).codes.any()
    twice = torch.randn(num_codes, 19, device=device).repeat(2, 1)
    assert (ops.z_select(hidden, twice).codes < num_codes).all()
    if not takes_top_p(backend):
        return
    # A top_p that one code reaches leaves the lowest of the equals, whatever the noise.
    assert not ops.z_select(hidden, one_row.expand(num_codes, -1), 1.0, top_p=0.5 / num_codes).codes.any()


def frequencies(probabilities, num_draws, device, **sampling):
    """How often each code is drawn from a given distribution."""
    logits = torch.tensor(probabilities, device=device).log()
    rows = torch.eye(len(probabilities), device=device)
    codes = ops.z_select(logits.expand(num_draws, -1), rows, **sampling).codes
    return torch.bincount(codes.long(), minlength=len(probabilities)).double().cpu()


def chi_square(counts, probabilities):
    expected = torch.tensor(probabilities, dtype=torch.float64) * counts.sum()
    return float(((counts - expected).square() / expected).sum())


PROBABILITIES = [0.3, 0.22, 0.18, 0.12, 0.08, 0.06, 0.03, 0.01]


@pytest.mark.op("z_select")
@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_sampling_follows_the_distribution(backend, device, seed, temperature):
    counts = frequencies(PROBABILITIES, number_of_draws(backend), device, temperature=temperature, seed=seed, step=3)
    tempered = [p ** (1 / temperature) for p in PROBABILITIES]
    assert chi_square(counts, [p / sum(tempered) for p in tempered]) < CHI_SQUARE_LIMIT[7]


@pytest.mark.op("z_select")
def test_top_p_renormalises_the_smallest_set(backend, device):
    if not takes_top_p(backend):
        pytest.skip(f"{backend} does not take top_p below 1")
    counts = frequencies(PROBABILITIES, number_of_draws(backend), device, temperature=1.0, top_p=0.85, seed=5)
    kept = PROBABILITIES[:5]  # 0.3 + 0.22 + 0.18 + 0.12 = 0.82 is not enough
    assert not counts[5:].any()
    assert chi_square(counts[:5], [p / sum(kept) for p in kept]) < CHI_SQUARE_LIMIT[4]


@pytest.mark.op("z_select")
def test_draws_of_rows_steps_and_seeds_are_independent(backend, device):
    """Pairs of draws that differ in one part of the key fall into the product distribution."""
    half = [0.5, 0.5]
    num_draws = number_of_draws(backend)
    logits = torch.tensor(half, device=device).log().expand(num_draws, -1)
    rows = torch.eye(2, device=device)

    def draw(**key):
        return ops.z_select(logits, rows, 1.0, **key).codes.long()

    base = draw(seed=1, step=0)
    shifted = torch.arange(num_draws, device=device) + 1
    high_bits = torch.arange(num_draws, device=device) + 2**32
    for other in (
        draw(seed=1, step=1),
        draw(seed=2, step=0),
        draw(seed=1 + 2**32, step=0),
        draw(seed=1, step=0, row_ids=shifted),
        draw(seed=1, step=0, row_ids=high_bits),
    ):
        pairs = torch.bincount(base * 2 + other, minlength=4).double().cpu()
        assert chi_square(pairs, [0.25] * 4) < CHI_SQUARE_LIMIT[3]


@pytest.mark.op("z_select")
def test_a_draw_does_not_depend_on_the_batch(backend, device):
    hidden, rows = torch.randn(37, 24, device=device), torch.randn(97, 24, device=device)
    row_ids = torch.randint(0, 2**62, (37,), device=device)
    sampling = {"temperature": 0.9, "top_p": 0.95 if takes_top_p(backend) else 1.0, "seed": 11, "step": 4}
    whole = ops.z_select(hidden, rows, row_ids=row_ids, **sampling)
    order = torch.randperm(37, device=device)
    shuffled = ops.z_select(hidden[order], rows, row_ids=row_ids[order], **sampling)
    assert torch.equal(shuffled.codes, whole.codes[order])
    for b in range(37):
        alone = ops.z_select(hidden[b : b + 1], rows, row_ids=row_ids[b : b + 1], **sampling)
        assert int(alone.codes) == int(whole.codes[b])
    repeated = ops.z_select(hidden, rows, row_ids=row_ids, **sampling)
    assert torch.equal(repeated.codes, whole.codes) and torch.equal(repeated.log_probs, whole.log_probs)


@pytest.mark.op("z_select")
def test_row_ids_default_to_the_position(backend, device):
    hidden, rows = torch.randn(50, 4, device=device), torch.randn(9, 4, device=device)
    given_ids = ops.z_select(hidden, rows, 1.0, seed=3, row_ids=torch.arange(50, device=device))
    assert torch.equal(ops.z_select(hidden, rows, 1.0, seed=3).codes, given_ids.codes)


@pytest.mark.op("z_select")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_without_finite_logits(backend, device, temperature, top_p, bad):
    if top_p < 1 and not takes_top_p(backend):
        pytest.skip(f"{backend} does not take top_p below 1")
    hidden, rows = torch.randn(5, 4, device=device), torch.randn(9, 4, device=device)
    expected = ops.z_select(hidden, rows, temperature, top_p)
    broken = hidden.clone()
    broken[2, 1] = bad
    actual = ops.z_select(broken, rows, temperature, top_p)
    assert int(actual.codes[2]) == 0 and math.isnan(float(actual.log_probs[2]))
    others = [0, 1, 3, 4]
    assert torch.equal(actual.codes[others], expected.codes[others])
    assert torch.equal(actual.log_probs[others], expected.log_probs[others])


@pytest.mark.op("z_select")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("code", [0, 4, 130, 139])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_code_without_finite_logits_is_every_rows(backend, device, temperature, code, bad):
    hidden, rows = torch.randn(3, 4, device=device), torch.randn(140, 4, device=device)
    rows[code, 2] = bad
    actual = ops.z_select(hidden, rows, temperature)
    assert actual.codes.tolist() == [0, 0, 0] and bool(actual.log_probs.isnan().all())


@pytest.mark.op("z_select")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4)}, r"hidden must be a tensor \[B, D\]"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int32)}, "hidden must be of dtype"),
        ({"rows": torch.zeros(9)}, r"rows must be a tensor \[V, D\]"),
        ({"rows": torch.zeros(9, 5)}, "rows must be of size 4 in dimension 1"),
        ({"rows": torch.zeros(0, 4)}, "rows must be not empty"),
        ({"rows": torch.zeros(9, 4).double()}, "rows must be of the dtype of hidden"),
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0"),
        ({"temperature": math.nan}, "temperature must be a finite number of at least 0"),
        ({"temperature": math.inf}, "temperature must be a finite number of at least 0"),
        ({"temperature": "1"}, "temperature must be a finite number of at least 0"),
        ({"top_p": 0.0}, r"top_p must be a number in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must be a number in \(0, 1\]"),
        ({"top_p": math.nan}, r"top_p must be a number in \(0, 1\]"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"seed": 2**63}, r"seed must be below 2\*\*63"),
        ({"seed": 0.5}, "seed must be an integer of at least 0"),
        ({"step": 2**32}, r"step must be below 2\*\*32"),
        ({"step": -1}, "step must be an integer of at least 0"),
        ({"row_ids": torch.zeros(3, dtype=torch.int32)}, "row_ids must be of dtype int64"),
        ({"row_ids": torch.zeros(2, dtype=torch.int64)}, "row_ids must be of size 3"),
        ({"row_ids": torch.zeros(3, 1, dtype=torch.int64)}, r"row_ids must be a tensor \[B\]"),
    ],
)
def test_bad_input(backend, device, change, message):
    arguments = {"hidden": torch.zeros(3, 4), "rows": torch.zeros(9, 4), **change}
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=f"z_select: {message}"):
        ops.z_select(**arguments)


def test_a_condition_on_the_arguments_is_obeyed_and_said(monkeypatch):
    used = []

    def narrow(*args):
        used.append(args)
        return reference.z_select(*args)

    condition = ("top_p is 1", lambda hidden, rows, temperature, top_p, *_: top_p == 1)
    monkeypatch.setattr(
        Z_SELECT, "backends", (backends.Backend("cpp", narrow, condition=condition), Z_SELECT.backends[-1])
    )
    hidden, rows = torch.zeros(2, 3), torch.zeros(4, 3)
    with ops.backend("cpp"):
        ops.z_select(hidden, rows, 1.0)
        assert len(used) == 1
        with pytest.raises(ops.BackendUnavailable, match="cpp: runs only where top_p is 1"):
            ops.z_select(hidden, rows, 1.0, 0.5)
    ops.z_select(hidden, rows, 1.0, 0.5)
    assert len(used) == 1


@pytest.mark.op("z_select")
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_views_as_input(backend, device, top_p):
    """Strided rows and elements, and row ids with something between them."""
    if top_p < 1 and not takes_top_p(backend):
        pytest.skip(f"{backend} does not take top_p below 1")
    hidden, rows = torch.randn(8, 9, device=device).T, torch.randn(70, 20, device=device)[:, ::2][:, :8]
    row_ids = torch.arange(18, device=device)[::2]
    result = ops.z_select(hidden, rows, 0.7, top_p, 3, row_ids)
    expected = ops.z_select(hidden.contiguous(), rows.contiguous(), 0.7, top_p, 3, row_ids.contiguous())
    assert torch.equal(result.codes, expected.codes) and torch.equal(result.log_probs, expected.log_probs)
