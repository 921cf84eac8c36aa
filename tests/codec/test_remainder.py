"""The remainder: tokens that the Z-tokens do not write, coded under the decompressor."""

import math
import warnings

import pytest
import torch

from tests.codec.conftest import shared_codec
from tests.codec.tiny_codec import packed_documents, tiny_codec
from tests.codec.tiny_slots import guessable_texts, tiny_slot_codec
from ztok_fast.codec import exact, remainder
from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.errors import ExactMismatchError, ZBatchError, ZFileError
from ztok_fast.codec.passes import compress_documents, pack_tokens, teacher_forced

LENGTHS = [64, 1, 37, 16, 0, 40]
"""The tiny codecs have sections of four segments of 16 tokens."""


@pytest.fixture(scope="module")
def slots():
    return tiny_slot_codec()


@pytest.fixture(params=["slots", "pooled"])
def own(request, slots):
    """A codec that runs in the engine, documents, and their Z-tokens."""
    codec = slots if request.param == "slots" else shared_codec("llama")
    codec._engines.use()
    documents = packed_documents(codec, LENGTHS, seed=5)
    return codec.model, documents, compress_documents(codec.model, documents, 6.0)


def lists(found):
    return [document.tolist() for document in found]


def test_every_token_comes_back_and_costs_its_surprisal(own):
    model, documents, z = own
    done = []
    streams = remainder.encode(model, z, documents, progress=done.append)
    assert lists(remainder.decode(model, z, streams, progress=done.append)) == documents
    assert sum(done) == 2 * sum(LENGTHS)
    with torch.inference_mode():
        _, _, loss = teacher_forced(model, z, pack_tokens(documents, "cpu"))
    bits = float(loss.sum()) / math.log(2)
    # A flag of a bit or so for each segment, and at most two bytes of a stream that its symbols do not fill.
    assert bits - 16 * len(documents) < 8 * sum(map(len, streams)) < bits + 3 * len(z.cu_segments) + 16 * len(documents)


def test_streams_do_not_depend_on_the_batch(own):
    model, documents, z = own
    streams = remainder.encode(model, z, documents)
    assert remainder.encode(model, z, documents, batch_tokens=1) == streams
    for i, stream in enumerate(streams):
        assert remainder.encode(model, z.select([i]), documents[i : i + 1]) == [stream]
        assert lists(remainder.decode(model, z.select([i]), [stream])) == [documents[i]]
    assert lists(remainder.decode(model, z, streams, batch_segments=1)) == documents


def test_what_is_guessed_right_takes_nothing(slots):
    slots._engines.use()
    documents = guessable_texts(slots)
    z = compress_documents(slots.model, documents, 2.0)
    streams = remainder.encode(slots.model, z, documents)
    assert streams == [b""] * len(documents)
    assert lists(remainder.decode(slots.model, z, streams)) == documents
    # One section of two that is not guessed right costs nothing in the other.
    other = [documents[0], packed_documents(slots, [40], 8)[0]]
    z = compress_documents(slots.model, other, 8.0)
    assert [bool(stream) for stream in remainder.encode(slots.model, z, other)][1]


def test_equal_documents_are_decoded_once(own):
    model, documents, z = own
    twice = z.select([0, 2, 0, 2])
    streams = remainder.encode(model, twice, [documents[i] for i in (0, 2, 0, 2)])
    assert streams[:2] == streams[2:]
    found = remainder.decode(model, twice, streams)
    assert found[0] is found[2] and lists(found[:2]) == [documents[0], documents[2]]
    if model.written(z) is not None:
        return
    # The same pooled Z-tokens with another remainder are another document.
    other = packed_documents(shared_codec("llama"), [64], 9)
    mixed = remainder.encode(model, z.select([0, 0]), [documents[0], other[0]])
    assert lists(remainder.decode(model, z.select([0, 0]), mixed)) == [documents[0], other[0]]


@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize("kind", ["slots", "pooled"])
def test_instruction_sets_read_each_other(precision, kind):
    codec = tiny_slot_codec() if kind == "slots" else tiny_codec()
    codec._engines.choice = precision
    codec._engines.use()
    documents = packed_documents(codec, LENGTHS, seed=6)
    z = compress_documents(codec.model, documents, 6.0)
    before, written = torch.ops.ztok.isa_native(-1), []
    found = [isa for isa in (0, 1, 2) if torch.ops.ztok.isa_native(isa) == isa]
    try:
        for isa in found:
            torch.ops.ztok.isa_native(isa)
            written.append(remainder.encode(codec.model, z, documents))
        for isa in found:
            torch.ops.ztok.isa_native(isa)
            assert lists(remainder.decode(codec.model, z, written[isa - 1])) == documents
    finally:
        torch.ops.ztok.isa_native(before)
    assert len({tuple(streams) for streams in written}) == 1


TEXTS = ["The text is small, as small texts go. " * 9, "", "a", b"\xff\x00 raw \xfe\xed", "é東🙂 " * 30]


@pytest.mark.parametrize("kind", ["slots", "pooled"])
@pytest.mark.parametrize("verify", [True, False])
def test_exact_mode_stores_the_remainder(slots, kind, verify):
    codec = slots if kind == "slots" else shared_codec("llama")
    done = []
    z = codec.compress(TEXTS, 6, exact=True, verify=verify, progress=done.append)
    expected = [text if isinstance(text, bytes) else text.encode() for text in TEXTS]
    assert codec.decompress_bytes(z) == expected
    assert sum(done) == 2 * z.tokens
    for document in z.documents:
        assert document.corrections.raw is not None or document.corrections.remainder is not None
        assert not len(document.corrections.positions)
    # A random model codes no text well; the remainder of text alone counts.
    forced = [None if d.corrections.raw is None else d for d in z.documents]
    stored = sum(d.corrections.stored_bytes for d in z.documents)
    assert z.rate_exact == pytest.approx(z.rate + 8 * stored / z.tokens) and len(forced) == len(TEXTS)


def unpacked(codec, texts, ratio=6):
    """Exact documents whose remainder is stored, although the original may take less."""
    z = codec.compress(texts, ratio, exact=True)
    documents = codec.tokenize(texts)
    limit = codec.config.section_tokens
    sections = [d[i : i + limit] for d in documents for i in range(0, len(d), limit)]
    found = exact.corrections_of(codec.model, z.sections(4)[0], sections, z.sections(4)[1])
    for info, own in zip(z.documents, found):
        info.corrections = own
    return z.validate()


def test_documents_of_several_sections_and_damage(slots):
    texts = ["The text is small, as small texts go; " * 12, "a", "", "small texts"]
    z = unpacked(slots, texts)
    assert slots.decompress(z) == texts
    stored = z.documents[0].corrections.remainder
    assert len(z.sections(4)[0]) > len(texts) and len(stored) > 20
    for at in range(0, len(stored), 3):
        for change in (b"\xff", b"\x00", b""):
            z.documents[0].corrections.remainder = stored[:at] + change + stored[at + 1 :]
            try:
                assert slots.decompress(z) == texts
            except (ExactMismatchError, ZFileError):
                continue
    z.documents[0].corrections.remainder = b"\x7f" * 9
    with pytest.raises(ZFileError, match="parts: expected"):
        slots.decompress(z)
    z.documents[0].corrections.remainder, z.documents[2].corrections.remainder = stored, b"x"
    with pytest.raises(ZFileError, match="parts: expected none"):
        slots.decompress(z)


def test_a_document_that_does_not_come_back_is_stored_as_it_is(slots, monkeypatch):
    decode = remainder.decode
    monkeypatch.setattr(remainder, "decode", lambda *args, **settings: [own[:-1] for own in decode(*args, **settings)])
    with pytest.warns(UserWarning, match=r"texts\[0\] did not come back"):
        z = slots.compress(["small texts go"], 6, exact=True)
    assert z.documents[0].corrections.raw == b"small texts go"
    monkeypatch.undo()
    assert slots.decompress(z) == ["small texts go"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slots.compress(["small texts go"], 6, exact=True)


def test_a_remainder_stands_alone():
    both = Corrections.of_remainder(b"x")
    both.positions = both.tokens = torch.tensor([0], dtype=torch.int32)
    with pytest.raises(ZBatchError, match="a remainder or positions"):
        both.validate(3)
    wrong = Corrections.stored_raw(b"text")
    wrong.remainder = b"x"
    with pytest.raises(ZBatchError, match="raw bytes alone"):
        wrong.validate(3)
    wrong = Corrections.of_remainder("x")
    with pytest.raises(ZBatchError, match="remainder: expected bytes"):
        wrong.validate(3)
    assert Corrections.of_remainder(b"x") != Corrections.of_remainder(b"y")
    assert Corrections.of_remainder(b"abc").stored_bytes == 3


def test_without_the_engine_there_is_no_remainder(slots):
    z = unpacked(slots, ["small texts go"])
    z.precision = "float"
    with pytest.raises(ZBatchError, match="expected int8 or float32 beside a remainder, got float"):
        slots.decompress(z)
