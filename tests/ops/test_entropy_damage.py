"""Streams that are damaged, cut or invented: some tokens, the same from every backend, and no access out of bounds.

That nothing outside of the tensors is read is tested with guard pages too (tests/native/guarded_ops.py).
"""

import random

import pytest
import torch

from tests.native.guard_pages import SIDES, guard
from tests.ops.entropy_cases import decode, draws, realistic
from ztok_fast import ops

LENGTHS = [20, 1, 0, 7]
CU_SYMBOLS = torch.tensor([0, *LENGTHS]).cumsum(0)


def good():
    generator = torch.Generator().manual_seed(0)
    logits = realistic(sum(LENGTHS), 200, generator)
    logits[5] = 0
    logits[6, 3] = 300
    targets = draws(logits, generator)
    return logits, targets, ops.range_encode(*ops.token_intervals(logits, targets), CU_SYMBOLS).to_bytes()


def damaged(streams, chance):
    """One of the streams with bits flipped, cut, extended, replaced by another or by extremes."""
    streams = [bytearray(stream) for stream in streams]
    victim = chance.choice([stream for stream in streams if stream])
    kind = chance.randrange(6)
    if kind == 0:
        for _ in range(chance.randint(1, 4)):
            victim[chance.randrange(len(victim))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del victim[chance.randrange(len(victim)) :]
    elif kind == 2:
        victim += chance.randbytes(chance.randint(1, 20))
    elif kind == 3:
        victim[:] = chance.randbytes(len(victim))
    elif kind == 4:
        victim[:] = bytes([chance.choice((0, 255))]) * chance.randint(0, 40)
    else:
        chance.shuffle(streams)
    return ops.Streams.from_bytes(streams)


def test_a_damaged_stream_gives_some_tokens():
    logits, targets, streams = good()
    assert torch.equal(decode(logits, CU_SYMBOLS, ops.Streams.from_bytes(streams)), targets)
    chance, different = random.Random(0), 0
    for _ in range(150):
        tokens = decode(logits, CU_SYMBOLS, damaged(streams, chance))
        assert int(tokens.min()) >= 0 and int(tokens.max()) < 200
        different += not torch.equal(tokens, targets)
    assert different > 100


def test_backends_agree_on_damaged_streams():
    logits, _, streams = good()
    chance = random.Random(1)
    for _ in range(15):
        hurt = damaged(streams, chance)
        found = []
        for backend in ("cpp", "reference"):
            with ops.backend(backend):
                found.append(decode(logits, CU_SYMBOLS, hurt))
        assert torch.equal(*found)


def test_damage_does_not_reach_other_streams():
    logits, targets, streams = good()
    streams[0] = bytes(len(streams[0]) + 3)
    tokens = decode(logits, CU_SYMBOLS, ops.Streams.from_bytes(streams))
    assert torch.equal(tokens[20:], targets[20:])


@pytest.mark.op("decode_tokens")
def test_states_that_nobody_gave(backend, device):
    """Positions and ends out of range read as zeros; only a range that is too small is refused."""
    if device == "cuda":
        pytest.skip("guard pages are for the CPU")
    logits = torch.zeros(8, 40)
    words = [-(2**63), -1, 0, 3, 2**62]
    rows = [[-1, value, position, end] for value in (0, -1) for position in words for end in words]
    for side in SIDES:
        data = guard(torch.full((5,), 255, dtype=torch.uint8), side)
        for first in range(0, len(rows), 8):
            state = torch.tensor(rows[first : first + 8])
            for _ in range(20):
                tokens, state = ops.decode_tokens(logits[: len(state)], state, data)
                assert int(tokens.min()) >= 0 and int(tokens.max()) < 40
    for width in (0, 1, 2**56 - 1):
        with pytest.raises(ValueError, match=r"decode_tokens: state .*range_decoder.*, got a range below 2\^56"):
            ops.decode_tokens(logits[:1], torch.tensor([[width, 0, 0, 0]]), data)


@pytest.mark.op("decode_symbols")
def test_damaged_symbols(backend, device):
    chance, counts = random.Random(2), torch.tensor([3, 1, 900, 2], device=device)
    for _ in range(30):
        streams = ops.Streams.from_bytes([chance.randbytes(chance.randint(0, 30)) for _ in range(3)])
        data, cu_symbols = streams.data.to(device), torch.tensor([0, 50, 50, 90], device=device)
        state = ops.range_decoder(data, streams.cu_bytes.to(device))
        symbols, _ = ops.decode_symbols(counts, state, data, cu_symbols, 90, 500)
        assert int(symbols.min()) >= 0 and int(symbols.max()) < 4


def test_arguments_that_are_refused():
    logits, state, data = torch.zeros(2, 40), torch.tensor([[-1, 0, 0, 0]] * 2), torch.zeros(3, dtype=torch.uint8)
    for bad, message in (
        ((logits, state[:1], data), "state must be of size 2"),
        ((logits, state[:, :3], data), "state must be of size 4"),
        ((logits, state.int(), data), "state must be of dtype int64"),
        ((logits, state, data.int()), "data must be of dtype uint8"),
        ((logits.half(), state, data), "logits must be of dtype float32"),
        ((logits * float("nan"), state, data), "logits must be finite"),
    ):
        with pytest.raises(ValueError, match=f"decode_tokens: {message}"):
            ops.decode_tokens(*bad)
