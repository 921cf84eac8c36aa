"""The range coder: round trips, lengths, carries, tables that learn, and an independent coder's lengths."""

import math
from fractions import Fraction

import constriction
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.entropy_cases import adversarial, bits_of, decode, draws, realistic
from ztok_fast import ops

LIMIT = 2**49


def packed(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


# --- the coder alone


@st.composite
def symbols(draw):
    """(start, size, total) with totals and sizes of all magnitudes, often at the ends, where carries come from."""
    total = draw(st.one_of(st.integers(1, 300), st.integers(LIMIT - 5, LIMIT - 1), st.integers(1, LIMIT - 1)))
    size = draw(st.one_of(st.just(1), st.just(total), st.integers(1, total)))
    start = draw(st.one_of(st.just(0), st.just(total - size), st.integers(0, total - size)))
    return start, size, total


def interval_of(stream):
    """The final interval (low, width) as exact fractions: the specification of the coder, without its words."""
    low, width, unit = Fraction(0), 2**64 - 1, 64  # low + width / 2^unit
    for start, size, total in stream:
        share = width // total
        low += Fraction(share * start, 2**unit)
        width = share * size
        while width < 2**56:
            width, unit = width << 8, unit + 8
    return low, Fraction(width, 2**unit)


@pytest.mark.op("range_encode")
@given(streams=st.lists(st.lists(symbols(), max_size=12), max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stream_is_the_shortest_number_in_its_interval(backend, device, streams):
    flat = torch.tensor([symbol for stream in streams for symbol in stream], dtype=torch.int64).reshape(-1, 3)
    start, size, total = flat.T.contiguous().to(device)
    cu_symbols = packed(*map(len, streams)).to(device)
    found = ops.range_encode(start, size, total, cu_symbols)
    assert found.data.numel() == 7 * len(flat) + 8 * len(streams)
    assert not found.data[int(found.cu_bytes[-1]) :].any()
    for stream, digits in zip(streams, found.to_bytes(), strict=True):
        low, width = interval_of(stream)
        number = Fraction(int.from_bytes(digits, "big"), 256 ** len(digits))
        assert low <= number < low + width
        if digits:
            unit = 256 ** (len(digits) - 1)  # no number of one digit less lies in the interval
            assert Fraction(math.ceil(low * unit), unit) >= low + width


@pytest.mark.op("range_encode")
def test_a_carry_goes_through_a_run_of_full_bytes(backend, device):
    """The middle third of the middle third ... contains 1/2 until the last symbol decides on a side."""
    middle = [(1, 1, 3)] * 30
    sides = [[*middle, (0, 1, 3)], [*middle, (2, 1, 3)]]
    flat = torch.tensor(sides[0] + sides[1]).T.contiguous().to(device)
    below, above = ops.range_encode(*flat, packed(31, 31).to(device)).to_bytes()
    assert below.startswith(b"\x7f\xff\xff\xff\xff") and above.startswith(b"\x80\0\0\0\0")
    for stream, digits in zip(sides, (below, above)):
        low, width = interval_of(stream)
        assert low <= Fraction(int.from_bytes(digits, "big"), 256 ** len(digits)) < low + width


@pytest.mark.op("range_encode")
def test_length_is_that_of_the_information(backend, device):
    generator = torch.Generator().manual_seed(0)
    total = torch.randint(1000, 2**34, (600,), generator=generator)
    size = (total * torch.rand(600, generator=generator, dtype=torch.float64) ** 4).long().clamp(min=1)
    start = (torch.rand(600, generator=generator) * (total - size)).long()
    lengths = [1, 0, 2, 97, 500, 0]
    streams = ops.range_encode(start.to(device), size.to(device), total.to(device), packed(*lengths).to(device))
    bits = -(size.double() / total.double()).log2()
    for length, digits, share in zip(lengths, streams.to_bytes(), bits.split(lengths), strict=True):
        assert 8 * len(digits) <= float(share.sum()) + 16
        assert length or not digits


def test_intervals_that_are_refused():
    good = torch.tensor([[0, 1, 2], [3, 4, 9]])
    cu_symbols = torch.tensor([0, 2])
    assert ops.range_encode(*good.T, cu_symbols).to_bytes() != [b""]
    for bad in ((-1, 2, 4), (0, 0, 4), (3, 2, 4), (0, 1, 0), (0, 1, -5), (0, 1, LIMIT), (2**62, 2**62, 5)):
        intervals = torch.stack([good[0], torch.tensor(bad)])
        with pytest.raises(
            ValueError, match=f"must be 0 <= start .* 2\\^49, got {bad[0]}, {bad[1]} and {bad[2]} for sy"
        ):
            ops.range_encode(*intervals.T, cu_symbols)
    for bad in ([0, 3], [1, 2], [0, 2, 1, 2], [0, 1]):
        with pytest.raises(ValueError, match="range_encode: cu_symbols must be"):
            ops.range_encode(*good.T, torch.tensor(bad))


def test_streams_as_bytes():
    pieces = [b"", b"\1\2", b"\xff" * 9, b"", b"\0\7"]
    streams = ops.Streams.from_bytes(pieces)
    assert streams.to_bytes() == pieces
    state = ops.range_decoder(*streams)
    assert [value & (2**64 - 1) for value in state[:, 1].tolist()] == [
        int.from_bytes(piece[:8].ljust(8, b"\0"), "big") for piece in pieces
    ]
    assert state[:, 2].tolist() == [0, 2, 10, 11, 13] and state[:, 3].tolist() == [0, 2, 11, 11, 13]
    assert ops.Streams.from_bytes([]).to_bytes() == []
    with pytest.raises(ValueError, match="range_decoder: cu_bytes must be at most 13"):
        ops.range_decoder(streams.data, torch.tensor([0, 14]))


# --- tokens


@pytest.mark.op("decode_tokens")
@pytest.mark.parametrize("size", [1, 2, 3, 2048, 49152])
def test_tokens_come_back(backend, device, size):
    """Every distribution in every stream; streams of different lengths, some empty, side by side."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.stack([*adversarial(size, generator).values()])
    lengths = [5, 0, 1, 12, 0, 3]
    logits = rows[torch.arange(sum(lengths)) % len(rows)].to(device)
    targets = torch.randint(0, size, (sum(lengths),), generator=generator).to(device)
    cu_symbols = packed(*lengths).to(device)
    streams = ops.range_encode(*ops.token_intervals(logits, targets), cu_symbols)
    assert torch.equal(decode(logits, cu_symbols, streams).to(device), targets)


@pytest.mark.op("decode_tokens")
def test_every_token_of_a_distribution_comes_back(backend, device):
    """Each as the only one of its stream: the ends of all intervals, blocks and stretches."""
    size = 300
    for row in adversarial(size, torch.Generator().manual_seed(1)).values():
        logits, targets = row.to(device).expand(size, size), torch.arange(size, device=device)
        streams = ops.range_encode(*ops.token_intervals(logits, targets), torch.arange(size + 1, device=device))
        found = ops.decode_tokens(logits, ops.range_decoder(*streams), streams.data)
        assert torch.equal(found.tokens, targets)


@pytest.mark.op("decode_tokens")
def test_a_decoder_does_not_depend_on_the_streams_beside_it(backend, device):
    generator = torch.Generator().manual_seed(2)
    logits = realistic(9, 500, generator).to(device)
    targets = draws(logits.cpu(), generator).to(device)
    streams = ops.range_encode(*ops.token_intervals(logits, targets), packed(3, 3, 3).to(device))
    state = ops.range_decoder(*streams)
    first = logits[::3]
    together = ops.decode_tokens(first, state, streams.data)
    for order in ([2], [1, 0], [0, 0, 2]):
        alone = ops.decode_tokens(first[order], state[order], streams.data)
        assert torch.equal(alone.tokens, together.tokens[order]) and torch.equal(alone.state, together.state[order])


@pytest.mark.parametrize("size", [2048, 49152])
def test_no_longer_than_an_independent_coder(size):
    """`constriction`, whose categorical distributions have 24 bits."""
    generator = torch.Generator().manual_seed(3)
    tokens = 200_000 // size * 6
    logits = realistic(tokens, size, generator)
    targets = draws(logits, generator)
    encoder = constriction.stream.queue.RangeEncoder()
    family = constriction.stream.model.Categorical(perfect=False)
    encoder.encode(targets.numpy().astype(np.int32), family, logits.double().softmax(1).float().numpy())
    theirs = 4 * len(encoder.get_compressed())
    ours = int(ops.range_encode(*ops.token_intervals(logits, targets), packed(tokens)).cu_bytes[-1])
    assert float(bits_of(logits, targets).sum()) / 8 - 1 <= ours <= theirs + 2


# --- tables


@pytest.mark.op("decode_symbols")
@pytest.mark.parametrize("increment", [0, 1, 40, 65536])
@pytest.mark.parametrize("size", [1, 2, 33])
def test_symbols_come_back(backend, device, increment, size):
    generator = torch.Generator().manual_seed(size)
    lengths = [40, 0, 7, 300]
    values = torch.randint(0, size, (sum(lengths),), generator=generator, dtype=torch.int32).to(device)
    cu_symbols = packed(*lengths).to(device)
    for counts in (torch.ones(size).long(), torch.randint(1, 2**31, (4, size), generator=generator)):
        counts = counts.to(device)
        intervals = ops.symbol_intervals(values, counts, cu_symbols, increment)
        streams = ops.range_encode(*intervals, cu_symbols)
        state = ops.range_decoder(*streams)
        found = ops.decode_symbols(counts, state, streams.data, cu_symbols, len(values), increment)
        assert found.symbols.tolist() == values.tolist()


@pytest.mark.op("symbol_intervals")
def test_a_table_learns_its_symbols(backend, device):
    """Close to the entropy of symbols whose distribution it was not told."""
    generator = torch.Generator().manual_seed(4)
    share = torch.tensor([0.7, 0.2, 0.05, 0.03, 0.01, 0.005, 0.004, 0.001])
    values = torch.multinomial(share, 4000, replacement=True, generator=generator).to(device)
    counts, cu_symbols = torch.ones(8, dtype=torch.int64, device=device), packed(4000).to(device)
    _, size, total = ops.symbol_intervals(values, counts, cu_symbols, 24)
    cost = -(size.double() / total.double()).log2().sum()
    entropy = -(share[values.cpu()].double().log2().sum())
    assert float(cost) < 1.02 * float(entropy) + 40
    assert int(total.max()) <= 2**16
    still = ops.symbol_intervals(values, counts, cu_symbols)
    assert bool((still.total == 8).all()) and torch.equal(still.start, values)


def test_tokens_and_symbols_in_one_stream():
    """A unit's length before its tokens, as a container would have it."""
    generator = torch.Generator().manual_seed(5)
    logits = realistic(5, 2048, generator)
    targets, counts = draws(logits, generator), torch.tensor([1, 5, 2])
    length = torch.tensor([2])
    parts = [ops.symbol_intervals(length, counts, packed(1)), ops.token_intervals(logits, targets)]
    streams = ops.range_encode(*map(torch.cat, zip(*parts)), packed(6))
    found, state = ops.decode_symbols(counts, ops.range_decoder(*streams), streams.data, packed(1), 1)
    tokens = []
    for row in logits:
        token, state = ops.decode_tokens(row[None], state, streams.data)
        tokens.append(int(token))
    assert found.tolist() == [2] and tokens == targets.tolist()


def test_tables_that_are_refused():
    values, counts, cu_symbols = torch.tensor([0, 1]), torch.tensor([1, 1]), packed(2)
    for bad, message in (
        ((values + 1, counts, cu_symbols), r"symbols must be in \[0, 2\), got 2"),
        ((values, counts - 1, cu_symbols), r"counts must be in \[1, 2147483648\], got 0"),
        ((values, counts * (2**31 + 1), cu_symbols), r"counts must be in \[1, 2147483648\], got 2147483649"),
        ((values, counts, packed(1)), "cu_symbols must be 2 in its last"),
        ((values, counts.expand(3, 2), cu_symbols), "counts must be of size 1 in dimension 0"),
        ((values, counts, cu_symbols, 65537), "increment must be at most 65536"),
        ((values, counts, cu_symbols, -1), "increment must be an integer of at least 0"),
        ((values.float(), counts, cu_symbols), "symbols must be of dtype int32, int64"),
    ):
        with pytest.raises(ValueError, match=f"symbol_intervals: {message}"):
            ops.symbol_intervals(*bad)
