"""Coded units in memory: exact, counted as learned units are, read from any segment on or up to any window."""

import math
import random

import pytest
import torch

from tests.codec.tiny_codec import tiny_codec
from ztok_fast.codec.base_model import load_base
from ztok_fast.codec.coded import DEFAULT_BASE, TextCoder
from ztok_fast.codec.coded_units import UnitCoder
from ztok_fast.codec.errors import CodecError, CodedUnitsWarning, ExactMismatchError, ZBatchError
from ztok_fast.codec.windows import Windows

PROSE = (
    "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals, when it was checked by "
    "a violent gust of wind which swept up the streets, rattling along the house-tops."
)
TEXTS = [PROSE, "", "a", "naïve café 東京 🙂\r\n\t\x00 end", "zq xj " * 20]


@pytest.fixture(scope="module")
def coder():
    return TextCoder(load_base(str(DEFAULT_BASE)), context=32, rows=3, window=16)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("levels", "size"), [(4, 2048), (2, 1000), (3, 16)])
def test_every_text_comes_back_and_is_counted(coder, aligned, levels, size):
    units = UnitCoder(coder, levels, size)
    z = units.compress(TEXTS, aligned)
    assert units.decompress(z) == [text.encode() for text in TEXTS]
    tokens = [len(own) for own in coder.tokens([text.encode() for text in TEXTS])]
    assert [one.tokens for one in z.documents] == tokens == [int(own.unit_lengths.sum()) for own in z]
    assert z.codes.shape == (z.ztokens, levels) and 0 <= int(z.codes.min()) <= int(z.codes.max()) < size
    assert z.achieved_ratio == sum(tokens) / z.ztokens
    assert z.rate == pytest.approx(z.ztokens * levels * math.log2(size) / sum(tokens))
    # Of what the tokens take under the model, little is lost: less by a stream.
    segments = [own[i : i + 32] for own in coder.tokens([PROSE.encode()]) for i in range(0, len(own), 32)]
    bits = float(coder.streams(segments)[1].sum())
    used = z[0].ztokens * levels * math.log2(size)
    assert bits < used < (1.35 if levels * math.log2(size) < 40 else 1.25) * bits + 44 * len(segments)


def test_aligned_windows_give_their_tokens_without_what_follows(coder):
    units = UnitCoder(coder)
    z = units.compress(TEXTS, aligned=True)
    whole = units.decompress_tokens(z)
    for count in range(int(z.cu_ztokens.diff().max()) + 1):
        head = z.head(count)
        for own, all_of_it, one, many in zip(units.decompress_tokens(head), whole, head, z):
            assert own == all_of_it[: int(many.unit_lengths[:count].sum())]
            assert one.ztokens == min(count, many.ztokens)
    texts = units.decompress(z.head(3))
    assert PROSE.encode().startswith(texts[0]) and 0 < len(texts[0]) < len(PROSE)
    with pytest.raises(ZBatchError, match="head: expected aligned units"):
        units.compress(TEXTS).head(1)


def test_a_document_or_a_segment_is_read_alone(coder):
    units = UnitCoder(coder)
    for aligned in (False, True):
        z = units.compress(TEXTS, aligned)
        assert [units.decompress(one)[0] for one in z] == [text.encode() for text in TEXTS]
    windows = Windows(coder.reader, 2048, 2048**4)
    [tokens] = coder.tokens([PROSE.encode()])
    segments = [tokens[i : i + 32] for i in range(0, len(tokens), 32)]
    coded = [[number for number, _ in own] for own in windows.encode(segments)]
    assert len(segments) > 1
    assert windows.decode(coded[1:2], 32) == [list(segments[1])]


def test_a_token_that_nothing_hints_at_fits_an_empty_window(coder):
    windows = Windows(coder.reader, 2048, 2049)
    draw = random.Random(0)
    tokens = [[draw.randrange(2048) for _ in range(20)] for _ in range(3)]
    coded = windows.encode(tokens)
    assert {count for own in coded for _, count in own} == {1}
    assert windows.decode([[number for number, _ in own] for own in coded], 20) == tokens


def test_damage_is_an_error(coder):
    units = UnitCoder(coder)
    z = units.compress([PROSE], aligned=True)
    draw = random.Random(1)
    bad = units.compress([PROSE], aligned=True)
    for _ in range(12):
        bad.codes = z.codes.clone()
        bad.codes[draw.randrange(z.ztokens), draw.randrange(4)] ^= 1 << draw.randrange(11)
        with pytest.raises((ZBatchError, ExactMismatchError)):
            units.decompress(bad)
    bad.codes = z.codes.clone()
    bad.codes[0, 0] = 2048
    with pytest.raises(ZBatchError, match="codes: expected 0 to 2047"):
        units.decompress(bad)
    with pytest.raises(ZBatchError, match="expected those of coder"):
        UnitCoder(coder, 5, 2048).decompress(z)


def test_mistakes(coder):
    units = UnitCoder(coder)
    with pytest.raises(CodecError, match=r"texts\[1\]: expected a string or bytes, got int"):
        units.compress(["a", 1])
    with pytest.raises(CodecError, match=r"texts\[0\]: expected text that the base model's tokens"):
        units.compress([b"\xff"])
    with pytest.raises(CodecError, match="more values than the 2048 tokens"):
        UnitCoder(coder, 1, 2048)
    with pytest.raises(CodecError, match=r"at most 2\^63"):
        UnitCoder(coder, 6, 2048)
    with pytest.raises(CodecError, match="levels: expected an integer"):
        UnitCoder(coder, 0)
    with pytest.raises(IndexError, match="expected a document from"):
        units.compress(["a"])[1]
    assert units.compress([]).ztokens == 0 and torch.equal(units.compress([]).cu_segments, torch.zeros(1).int())


def test_a_codec_keeps_text_as_coded_units_and_decodes_them_before_a_model_reads_them():
    codec = tiny_codec("llama", num_codebooks=4)
    texts = ["Hello world, this is a text.", "", "Another one of them."]
    z = codec.compress(texts, units="coded", aligned=True)
    assert z.aligned and codec.decompress(z) == texts == codec.decompress(codec.compress(texts, units="coded"))
    assert [len(own) for own in codec.decompress_tokens(z)] == [one.tokens for one in z.documents]
    learned = codec.compress(texts)
    with pytest.warns(CodedUnitsWarning, match="generate: a model cannot read coded units; they are decoded"):
        assert codec.generate(z, 3) == codec.generate(learned, 3)
    with pytest.warns(CodedUnitsWarning, match="answer: "):
        assert codec.answer(z, "Who?", 4) == codec.answer(learned, "Who?", 4)
    with pytest.raises(CodecError, match="units: expected no ratio, exact"):
        codec.compress(texts, 8, units="coded")
    with pytest.raises(CodecError, match="units: expected learned, or coded.*, got 'both'"):
        codec.compress(texts, units="both")
    with pytest.raises(CodecError, match="coded where they are aligned, got 'learned'"):
        codec.compress(texts, aligned=True)
