"""Slots coded under the compressor's model: the same Z-tokens come back, whatever runs beside them."""

import math

import pytest
import torch

from tests.codec.tiny_codec import packed_documents, tiny_codec
from tests.codec.tiny_slots import SEGMENT, SLOTS
from ztok_fast.codec import slot_prior
from ztok_fast.codec.draft import draft, draft_hidden, symbol_logits, symbol_losses
from ztok_fast.codec.draft_head import SHARES
from ztok_fast.codec.errors import CodecError, ZFileError
from ztok_fast.codec.layout import offsets
from ztok_fast.codec.slots import fill_slots, fill_units, slot_mass, written_tokens
from ztok_fast.codec.ztokens import ZTokens, concatenate

LENGTHS = [70, 16, 0, 33, 1, 160]


@pytest.fixture(scope="module")
def codec():
    codec = tiny_codec(**SLOTS)
    with torch.no_grad():
        # What is written and how much of it matters, so that a stream read with other inputs would not come back.
        codec.model.draft.choice.weight.normal_(std=2.0, generator=torch.Generator().manual_seed(1))
        codec.model.draft.written.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
        codec.model.draft.shares.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
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
    return slot_prior.decode(model, streams, tokens)


def fixed(z: ZTokens, length: int) -> ZTokens:
    """The same slots in units of ``length`` tokens, the last one of a segment shorter."""
    named, own = written_tokens(z), [[length] * (n // length) + [n % length][: n % length] for n in lengths_of(z)]
    lengths = torch.tensor([n for lengths in own for n in lengths], dtype=torch.int32)
    cu = offsets(torch.tensor([len(lengths) for lengths in own]))
    return fill_units(named.clamp(min=0), named >= 0, lengths, cu, z.cu_documents, z.num_codebooks)


def lengths_of(z: ZTokens) -> list[int]:
    return z.cu_text.diff().tolist()


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


def test_documents_of_more_segments_than_are_read_side_by_side(codec, model, monkeypatch):
    z = some_ztokens(codec)
    whole = slot_prior.encode(model, z)
    monkeypatch.setattr(slot_prior, "ROWS", 3)
    monkeypatch.setattr(type(model), "rows_at_once", 10)
    streams = slot_prior.encode(model, z)
    assert same(read(model, streams, z), z)
    assert streams != whole, "other segments take turns"


@pytest.mark.parametrize("length", [1, 2])
def test_units_that_no_rule_gives_are_listed(codec, model, length):
    z = fixed(some_ztokens(codec, share=0.3), length)
    streams = slot_prior.encode(model, z)
    assert same(read(model, streams, z), z)
    shortest = slot_prior.encode(model, some_ztokens(codec, share=0.3))
    assert sum(map(len, streams)) > sum(map(len, shortest)), "their lengths are told"


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


def test_symbols_cost_what_the_compressor_says(codec, monkeypatch):
    """The bits of a stream are those of the losses that training lowers, and of its first symbol."""
    monkeypatch.setattr(codec._engines, "choice", "float32")
    codec._engines.use()
    model, z = codec.model, some_ztokens(codec, [160])
    with torch.no_grad():
        named = written_tokens(z)
        share = torch.full((10,), int((named >= 0).sum()) * SHARES // 160)
        drafted = draft(model, named, z.cu_text, share)
        losses, _ = symbol_losses(model, drafted, named, named.clamp(min=0), z.cu_text, share)
        assert torch.equal(drafted[named >= 0], named[named >= 0])
        model.engine = None
        by_steps = draft(model, named, z.cu_text, share)
        found, _ = symbol_losses(model, drafted, named, named.clamp(min=0), z.cu_text, share)
    expected = float(losses.double().sum()) / math.log(2) + math.log2(2 * SHARES * 3)
    codec._engines.use()
    (stream,) = slot_prior.encode(model, z)
    assert expected - 8 <= 8 * len(stream) <= expected + 16
    assert torch.equal(by_steps, drafted), "transformers' modules draft the same"
    torch.testing.assert_close(found, losses, atol=1e-3, rtol=1e-3)
    assert float(losses.max()) > 8, "the symbols are not even"


def test_a_draft_is_the_guesses_after_what_is_written(codec, model):
    """A draft, and the hidden states of its pass, give the guesses that the draft has."""
    z = some_ztokens(codec, [160, 20])
    named, share = written_tokens(z), torch.zeros(len(z.cu_text) - 1, dtype=torch.int64)
    with torch.inference_mode():
        drafted = draft(model, named, z.cu_text, share)
        hidden = draft_hidden(model, drafted, named >= 0, z.cu_text, share)
        logits, guesses = symbol_logits(model, hidden)
        plain, choice = model.runtime.logits(hidden), model.runtime.linear(model.draft.choice, hidden)
    assert torch.equal(torch.where(named >= 0, named, guesses), drafted)
    assert logits.shape == (180, codec.config.codebook_size + 1)
    torch.testing.assert_close(logits[:, -1], plain.amax(1) + choice[:, 0])
    at = plain.argmax(1, keepdim=True)
    torch.testing.assert_close(logits.gather(1, at), plain.gather(1, at) - choice[:, 1:])


def test_damaged_streams_give_slots_or_an_error(codec, model):
    z = fixed(some_ztokens(codec, [40, 12], share=0.2), 2)
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


def test_transformers_modules_are_refused(codec, monkeypatch):
    monkeypatch.setattr(codec._engines, "choice", "float")
    codec._engines.use()
    z = some_ztokens(codec)
    with pytest.raises(CodecError, match="expected a codec whose base model the engine runs"):
        slot_prior.encode(codec.model, z)
    with pytest.raises(CodecError, match="expected a codec whose base model the engine runs"):
        read(codec.model, [b""] * len(z), z)
