"""The codec's own functions on tiny random bases: what goes in comes back, deterministically, the base untouched."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.codec.tiny_codec import packed_documents, tiny_causal_lm, tiny_codec
from ztok_fast.codec.base_model import fingerprint
from ztok_fast.codec.config import ConfigError
from ztok_fast.codec.errors import CodecError, ZBatchError
from ztok_fast.codec.passes import batches, compress_documents

TEXTS = ["A small text to compress; " * 8, "", "x", "Small texts learn merges, \r\n\tas small texts go: 東京 🙂."]


def test_lossy_round_trip_runs_and_repeats(family_codec):
    z = family_codec.compress(TEXTS, ratio=2)
    again = family_codec.compress(TEXTS, ratio=2)
    assert z == again
    texts = family_codec.decompress(z)
    assert texts == family_codec.decompress(again) and len(texts) == len(TEXTS)
    assert texts[1] == "" and [d.tokens for d in z.documents][1:3] == [0, 1]
    assert z.achieved_ratio == pytest.approx(2, rel=0.1)
    bits = 2 * 4 + 3  # two codes of 16 entries, unit lengths to 8
    assert z.rate == pytest.approx(bits / z.achieved_ratio)


def test_exact_mode_returns_every_byte(family_codec, tmp_path):
    z = family_codec.compress(TEXTS, ratio=3, exact=True)
    assert family_codec.decompress(z) == TEXTS
    family_codec.save(z, tmp_path / "texts.ztok")
    assert family_codec.decompress(family_codec.load(tmp_path / "texts.ztok")) == TEXTS


def test_base_is_never_changed(family):
    codec = tiny_codec(family)
    z = codec.compress(TEXTS, exact=True)
    codec.decompress(z)
    codec.generate(z, 4, temperature=1.0)
    codec.answer(z, "Which text?", 3)
    bare = tiny_causal_lm(family, len(codec.model.adapted.embedding.weight))
    own = {n.replace(".base_layer", ""): p for n, p in codec.base.model.named_parameters() if "lora_" not in n}
    for name, parameter in bare.named_parameters():
        assert torch.equal(own.pop(name), parameter), name
    assert not own
    assert fingerprint(bare) == codec.base.fingerprint


def test_weights_in_float32_of_the_base_are_frozen_and_the_codecs_are_not(codec):
    trained = {id(p) for p in codec.model.trainable_parameters().values()}
    for name, parameter in codec.model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name


def test_fewer_levels_leave_the_codes_before_them_as_they_are(codec):
    full, one = codec.compress(TEXTS, ratio=2), codec.compress(TEXTS, ratio=2, levels=1)
    assert torch.equal(one.codes[:, 0], full.codes[:, 0]) and (one.codes[:, 1] == -1).all()
    assert torch.equal(one.unit_lengths, full.unit_lengths)
    assert one.rate < full.rate and [d.levels for d in one.documents] == [1] * 4
    assert len(codec.decompress(one)) == 4
    vectors = codec.model.dequantize(one.codes)
    assert torch.equal(vectors, codec.model.codebooks[0][one.codes[:, 0].long()])


def test_documents_compress_alike_alone_and_together(family_codec):
    """Floating-point sums may depend on the shape of a batch, so a code can differ where two are within rounding of
    each other. These seeds have no such pair (checked by the margin), so the codes must be equal."""
    documents = packed_documents(family_codec, [70, 3, 33, 16])
    together = compress_documents(family_codec.model, documents, 3.0)
    for document, key in zip(documents, together.keys()):
        assert compress_documents(family_codec.model, [document], 3.0).keys() == [key]


def test_batch_tokens_bound_the_pass_and_not_the_result(codec):
    assert codec.compress(TEXTS, ratio=2, batch_tokens=20) == codec.compress(TEXTS, ratio=2)


def test_long_documents_are_cut_into_sections_that_share_nothing(codec):
    limit = codec.config.section_tokens
    assert limit == 64
    text = "The text is small. " * 40
    z = codec.compress([text], ratio=4)
    tokens = z.tokens
    sections, counts = z.sections(codec.config.section_segments)
    assert counts == [len(sections)] and sections.joined(counts).keys() == z.keys()
    lengths = [sections.part(i).cu_text.diff().tolist() for i in range(len(sections))]
    assert [sum(own) for own in lengths] == [limit] * (tokens // limit) + [tokens % limit]
    assert all(own[:-1] == [16] * (len(own) - 1) for own in lengths)
    ids = codec.tokenizer(text)["input_ids"]
    first = codec.compress([codec.tokenizer.decode(ids[:limit])], ratio=4)
    assert torch.equal(first.codes, sections.part(0).codes)


def test_equal_sections_are_compressed_and_decoded_once(codec, monkeypatch):
    seen = []
    encode = codec.model.encode
    monkeypatch.setattr(codec.model, "encode", lambda tokens, *rest: seen.append(len(tokens)) or encode(tokens, *rest))
    one = packed_documents(codec, [64])[0]
    keys = compress_documents(codec.model, [one] * 50 + [one[:10]], 4.0).keys()
    assert sum(seen) == 74
    assert len(keys) == 51 and len(set(keys[:50])) == 1 != len(set(keys))


def test_progress_counts_every_token(codec):
    done = []
    z = codec.compress(TEXTS * 2, ratio=2, progress=done.append)
    assert sum(done) == z.tokens
    done.clear()
    exact = codec.compress(TEXTS * 2, ratio=2, exact=True, progress=done.append)
    assert sum(done) == 2 * z.tokens
    done.clear()
    codec.decompress(z, progress=done.append)
    assert sum(done) == z.tokens == exact.tokens


def test_nothing_gives_nothing(codec):
    z = codec.compress([], ratio=2, exact=True)
    assert len(z) == 0 and codec.decompress(z) == [] and math.isnan(z.achieved_ratio)
    empty = codec.compress([""], ratio=2, exact=True)
    assert empty.ztokens == 0 and codec.decompress(empty) == [""]


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 12))
@settings(deadline=None)
def test_batches_are_consecutive_and_bounded(sizes, limit):
    found = batches(sizes, limit)
    assert [i for b in found for i in b] == list(range(len(sizes)))
    for batch in found:
        assert len(batch) == 1 or sum(sizes[i] for i in batch) <= limit


def test_z_of_another_codec_is_refused(codec):
    other = tiny_codec(seed=7)
    z = other.compress(["a text"], ratio=2)
    for use in (codec.decompress, codec.generate, lambda z: codec.answer(z, "?")):
        with pytest.raises(ZBatchError, match="codec: expected the one with fingerprint"):
            use(z)


def test_segments_longer_than_the_codec_makes_are_refused(codec):
    z = codec.compress(["A small text to compress and to tamper with, which has more than a segment."], ratio=2)
    z.cu_segments = torch.tensor([0, z.ztokens], dtype=torch.int32)
    z.cu_documents = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ZBatchError, match="expected at most 16 text tokens in each, got"):
        codec.decompress(z)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": "one string"}, CodecError, "texts: expected a list of strings, got one str"),
        ({"texts": ["a", 3]}, CodecError, r"texts\[1\]: expected a string or bytes, got int"),
        ({"ratio": 0.5}, ConfigError, "ratio: expected between 1 and 8"),
        ({"ratio": 9}, ConfigError, "ratio: expected between 1 and 8"),
        ({"ratio": "4"}, ConfigError, "ratio: expected a number, got '4'"),
        ({"levels": 0}, CodecError, "levels: expected an integer from 1 to 2, got 0"),
        ({"levels": 3}, CodecError, "levels: expected an integer from 1 to 2, got 3"),
        ({"levels": True}, CodecError, "levels: expected an integer from 1 to 2, got True"),
        ({"batch_tokens": 0}, CodecError, "batch_tokens: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_of_compress(codec, arguments, error, message):
    with pytest.raises(error, match=message):
        codec.compress(**({"texts": ["a"], "ratio": 2} | arguments))


def test_bad_arguments_of_decompress(codec):
    z = codec.compress(["a"], ratio=2)
    with pytest.raises(CodecError, match="z: expected a ZBatch, got list"):
        codec.decompress([z])
    with pytest.raises(CodecError, match="batch_segments: expected an integer of at least 1"):
        codec.decompress(z, batch_segments=0)
