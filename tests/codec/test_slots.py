"""Z-tokens of slots: how text is cut, what the decompressor is told, and the stream that stores it."""

import pytest
import torch

from ztok_fast.codec.errors import ZFileError
from ztok_fast.codec.slot_coding import decode_slots, encode_slots
from ztok_fast.codec.slots import ahead, fill_slots, slot_mass, written_tokens

SLOTS, VOCABULARY, LONGEST = 3, 50, 40
LENGTHS = [40, 1, 0, 17, 40, 5]
CU = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
DOCUMENTS = torch.tensor([0, 2, 6], dtype=torch.int32)


def some_text(share: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    total = int(CU[-1])
    tokens = torch.randint(VOCABULARY, (total,), generator=draw)
    return tokens, torch.rand(total, generator=draw) < share


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_units_end_when_their_slots_are_full(share):
    tokens, written = some_text(share)
    z = fill_slots(tokens, written, CU, DOCUMENTS, SLOTS)
    assert torch.equal(z.cu_text, CU) and torch.equal(z.cu_documents, DOCUMENTS)
    first = 0
    for begin, end, units in zip(CU[:-1], CU[1:], z.cu_segments.diff().tolist()):
        places = written[begin:end].nonzero()[:, 0].tolist()
        wanted = [places[i : i + SLOTS] for i in range(0, len(places), SLOTS)] or [[]] * int(end > begin)
        assert units == len(wanted), "as few units as hold what is written"
        start = 0
        for row, own in enumerate(wanted, start=first):
            used = int((z.codes[row] >= 0).sum())
            assert z.codes[row, :used].tolist() == [int(tokens[begin + p]) for p in own]
            assert z.slot_offsets[row, :used].tolist() == [p - start for p in own]
            assert (z.slot_offsets[row, used:] == -1).all()
            start += int(z.unit_lengths[row])
            if row + 1 < first + units:
                assert start == own[-1] + 1, "a unit ends with its last slot"
        first += units


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_is_written_comes_back(share):
    tokens, written = some_text(share)
    named = written_tokens(fill_slots(tokens, written, CU, DOCUMENTS, SLOTS))
    assert torch.equal(named, torch.where(written, tokens, -1))


@pytest.mark.parametrize("asked", [1, 4, 9, 20])
def test_more_units_than_are_needed(asked):
    tokens, written = some_text(0.4)
    units = torch.tensor([min(asked, n) for n in LENGTHS])
    z = fill_slots(tokens, written, CU, DOCUMENTS, SLOTS, slot_mass(written, CU, SLOTS, units))
    needed = torch.tensor([-(-int(written[a:b].sum()) // SLOTS) for a, b in zip(CU[:-1], CU[1:])])
    found = z.cu_segments.diff()
    assert (found >= torch.maximum(needed, torch.tensor(LENGTHS).clamp(max=1))).all()
    assert ((found - torch.maximum(units, needed)).abs() <= 1).all()
    assert torch.equal(written_tokens(z), torch.where(written, tokens, -1))


def test_ahead_is_the_next_written_tokens_of_the_segment():
    _, written = some_text(0.3)
    index, distance = ahead(written, CU, 2)
    places = written.nonzero()[:, 0].tolist()
    for begin, end in zip(CU[:-1].tolist(), CU[1:].tolist()):
        for row in range(begin, end):
            following = [p for p in places if row < p < end][:2]
            assert distance[row].tolist() == [p - row for p in following] + [0] * (2 - len(following))
            assert [places[i] for i in index[row, : len(following)].tolist()] == following


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_stream_gives_back_the_slots(share):
    tokens, written = some_text(share)
    z = fill_slots(tokens, written, CU, DOCUMENTS, SLOTS)
    stream = encode_slots(z, VOCABULARY, LONGEST)
    codes, lengths, places = decode_slots(stream, z.ztokens, SLOTS, VOCABULARY, LONGEST)
    assert torch.equal(codes, z.codes) and torch.equal(lengths, z.unit_lengths) and torch.equal(places, z.slot_offsets)
    assert len(encode_slots(z, VOCABULARY, LONGEST, codes=False)) <= len(stream)


def test_a_stream_of_regular_slots_is_small():
    """600 units that are all alike cost their first few symbols."""
    tokens = torch.arange(3600) % 6
    written = tokens % 2 == 1
    cu = torch.tensor([0, 3600], dtype=torch.int32)
    z = fill_slots(tokens, written, cu, torch.tensor([0, 1], dtype=torch.int32), SLOTS)
    assert z.ztokens == 600
    assert len(encode_slots(z, 6, LONGEST, codes=False)) < 60


def test_a_damaged_stream_gives_slots_or_an_error():
    tokens, written = some_text(0.4)
    z = fill_slots(tokens, written, CU, DOCUMENTS, SLOTS)
    stream, refused = encode_slots(z, VOCABULARY, LONGEST), 0
    for at in range(len(stream)):
        try:
            codes, lengths, _ = decode_slots(
                stream[:at] + bytes([stream[at] ^ 0x55]) + stream[at + 1 :], z.ztokens, SLOTS, VOCABULARY, LONGEST
            )
        except ZFileError:
            refused += 1
            continue
        assert codes.max() < VOCABULARY and 1 <= lengths.min() and lengths.max() <= LONGEST
    assert 0 < refused < len(stream)
