"""Slots coded with the inferencer as the prior: the same Z-tokens come back, whatever runs beside them."""

import pytest
import torch

from tests.codec.tiny_codec import packed_documents, tiny_codec
from tests.codec.tiny_slots import SEGMENT, SLOTS
from ztok_fast.codec import slot_prior
from ztok_fast.codec.errors import CodecError, ZFileError
from ztok_fast.codec.layout import offsets
from ztok_fast.codec.slots import fill_slots, slot_mass
from ztok_fast.codec.ztokens import ZTokens, concatenate

LENGTHS = [70, 16, 0, 33, 1, 160]


@pytest.fixture(scope="module")
def codec():
    codec = tiny_codec(**SLOTS)
    with torch.no_grad():
        # Far from even, so that a stream read with other logits would not come back.
        codec.model.zspace.queries.mul_(200)
    return codec


@pytest.fixture(params=["int8", "float32"])
def model(codec, request, monkeypatch):
    monkeypatch.setattr(codec._engines, "choice", request.param)
    codec._engines.use()
    return codec.model


def some_ztokens(codec, lengths=LENGTHS, share=0.5, segment=SEGMENT, spare=0) -> ZTokens:
    """Slots of random documents; ``spare``: units in each segment, more than it needs."""
    documents = packed_documents(codec, lengths, seed=5)
    tokens = torch.tensor([t for own in documents for t in own], dtype=torch.int64)
    cuts = [[min(segment, n - at) for at in range(0, n, segment)] for n in lengths]
    cu = offsets(torch.tensor([n for own in cuts for n in own]))
    written = torch.rand(len(tokens), generator=torch.Generator().manual_seed(6)) < share
    cu_documents = offsets(torch.tensor([len(own) for own in cuts]))
    slots = codec.config.num_codebooks
    mass = slot_mass(written, cu, slots, torch.full((len(cu) - 1,), spare)) if spare else None
    return fill_slots(tokens, written, cu, cu_documents, slots, mass)


def same(one: ZTokens, other: ZTokens) -> bool:
    names = ("codes", "unit_lengths", "slot_offsets", "cu_segments", "cu_documents")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def read(model, streams, z: ZTokens, tokens=None) -> ZTokens:
    tokens = [int(z.part(i).unit_lengths.sum()) for i in range(len(z))] if tokens is None else tokens
    return slot_prior.decode(model, streams, z.cu_segments, z.cu_documents, tokens)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("spare", [0, 12])
def test_slots_come_back(codec, model, share, spare):
    z = some_ztokens(codec, share=share, spare=spare)
    assert same(read(model, slot_prior.encode(model, z), z), z)


def test_a_document_has_the_same_stream_in_every_batch(codec, model):
    z = some_ztokens(codec)
    together = slot_prior.encode(model, z)
    assert together == [slot_prior.encode(model, z.part(i))[0] for i in range(len(z))]
    order = [5, 0, 3, 5, 2]
    assert same(read(model, [together[i] for i in order], z.select(order)), z.select(order))


def test_documents_longer_than_the_context(codec, model, monkeypatch):
    monkeypatch.setattr(slot_prior, "CONTEXT", 7)
    monkeypatch.setattr(slot_prior, "ROWS", 3)
    monkeypatch.setattr(type(model), "rows_at_once", 10)
    z = some_ztokens(codec)
    streams = slot_prior.encode(model, z)
    assert same(read(model, streams, z), z)
    monkeypatch.setattr(slot_prior, "CONTEXT", 512)
    assert streams != slot_prior.encode(model, z)


def test_gaps_that_the_inferencer_does_not_tell_apart(monkeypatch):
    codec = tiny_codec(**(SLOTS | {"segment_length": 100, "max_unit_length": 100}))
    codec._engines.use()
    z = some_ztokens(codec, [250, 90], share=0.02, segment=100)
    assert int(z.slot_offsets.max()) > 50
    assert same(read(codec.model, slot_prior.encode(codec.model, z), z), z)


def test_segments_that_are_not_full_come_back(codec, model):
    """As those of generated Z-tokens."""
    parts = [some_ztokens(codec, [n]) for n in (13, 7, 16, 2)]
    z = concatenate(parts)
    z.cu_documents = torch.tensor([0, 3, 4], dtype=torch.int32)
    assert same(read(model, slot_prior.encode(model, z), z), z)


def test_streams_of_one_instruction_set_are_read_under_each_other(codec, model):
    z = some_ztokens(codec)
    before = torch.ops.ztok.isa_native(-1)
    found = [isa for isa in (0, 1, 2) if torch.ops.ztok.isa_native(isa) == isa]
    try:
        written = []
        for isa in found:
            torch.ops.ztok.isa_native(isa)
            written.append(slot_prior.encode(model, z))
        assert all(streams == written[0] for streams in written)
        for isa in found:
            torch.ops.ztok.isa_native(isa)
            assert same(read(model, written[0], z), z)
    finally:
        torch.ops.ztok.isa_native(before)


def test_symbols_cost_what_the_inferencer_says(codec, monkeypatch):
    monkeypatch.setattr(codec._engines, "choice", "float32")
    codec._engines.use()
    head, z = codec.model.zspace, some_ztokens(codec)
    words = head.words(codec.model.adapted.embedding.weight)
    with torch.inference_mode():
        prior = slot_prior._Prior(codec.model)
        hidden = prior.hidden(z, slot_prior.Layout(codec.model, z.cu_segments, z.cu_documents))
        intervals, _ = prior.intervals(hidden, z)
        expected = []
        for own, codes, places in zip(hidden, z.codes.tolist(), z.slot_offsets.tolist()):
            chosen, place = 0.0, -1
            for slot in range(sum(code >= 0 for code in codes)):
                gap, place = places[slot] - place - 1, places[slot]
                chosen = chosen + head.gap_rows[slot][gap]
                logits = (own @ head.queries[2 * slot + 1].T + chosen) @ words.T
                expected.append(logits.double().log_softmax(0)[codes[slot]])
                chosen = chosen + words[codes[slot]]
    found = (intervals[:, 1].double() / intervals[:, 2].double()).log()
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-3, rtol=1e-3)
    assert float(found.min()) < -8, "the prior is not even"


def test_bits_are_those_of_the_streams(codec, model):
    z = some_ztokens(codec)
    for bits, stream in zip(slot_prior.bits(model, z).tolist(), slot_prior.encode(model, z)):
        assert bits - 8 <= 8 * len(stream) <= bits + 16 or not stream


def test_damaged_streams_give_slots_or_an_error(codec, model):
    z = some_ztokens(codec, [40, 12], share=0.2)
    streams, refused, tried = slot_prior.encode(model, z), 0, 0
    damaged = [streams[0][:at] + bytes([streams[0][at] ^ 0x55]) + streams[0][at + 1 :] for at in range(len(streams[0]))]
    for own in [*damaged, b"", streams[0][:5], b"\xff" * 30, streams[1]]:
        tried += 1
        try:
            found = read(model, [own, streams[1]], z, [40, 12])
        except ZFileError:
            refused += 1
            continue
        assert 0 <= int(found.codes[found.codes >= 0].min()) and int(found.codes.max()) < codec.config.codebook_size
        assert 1 <= int(found.unit_lengths.min()) and int(found.unit_lengths.max()) <= SEGMENT
        assert (found.slot_offsets < found.unit_lengths[:, None]).all()
        assert same(found.part(1), z.part(1)), "a stream is its document's own"
    assert 0 < refused < tried


def test_parts_that_are_joined():
    for parts in ([], [b""], [b"ab", b"", b"x" * 300, b"y"]):
        assert slot_prior.split(slot_prior.join(parts), len(parts)) == parts
    for data, count in ((b"a", 0), (b"\x05abc", 2), (b"\x80", 2), (b"", 3)):
        with pytest.raises(ZFileError):
            slot_prior.split(data, count)


def test_transformers_modules_are_refused(codec, monkeypatch):
    monkeypatch.setattr(codec._engines, "choice", "float")
    codec._engines.use()
    z = some_ztokens(codec)
    with pytest.raises(CodecError, match="expected a codec whose base model the engine runs"):
        slot_prior.encode(codec.model, z)
    with pytest.raises(CodecError, match="expected a codec whose base model the engine runs"):
        read(codec.model, [b""] * len(z), z)
