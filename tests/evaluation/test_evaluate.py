"""The numbers of an evaluation, against the same by hand, and that a codec needs its language model for them."""

import math

import pytest
import torch

import ztok_fast
from tests.codec.coded_files import records_of
from tests.codec.tiny_codec import packed_documents, tiny_causal_lm, tiny_codec
from tests.codec.tiny_slots import SLOTS, VOCABULARY, tiny_slot_codec
from ztok_fast.codec import learned_records
from ztok_fast.codec.layout import offsets
from ztok_fast.codec.passes import compress_documents, decompress_documents, pack_tokens, teacher_forced
from ztok_fast.codec.slots import fill_slots
from ztok_fast.evaluation import scores, ways
from ztok_fast.evaluation.evaluate import CODEC, COMPRESSOR, DECOMPRESSOR, OPEN_LOOP, WAYS, compare, ways_of
from ztok_fast.evaluation.sample import Sample
from ztok_fast.evaluation.scores import Outcome, score

TEXTS = [
    "a small text to learn a few merges from, and the text is small; as small texts go, it is the text",
    "",
    "the text is small",
    "a",
]


@pytest.fixture(scope="module")
def slots():
    return tiny_slot_codec()


@pytest.fixture(scope="module")
def pooled():
    return tiny_codec(copy_path=True)


@pytest.fixture(params=["slots", "pooled"])
def codec(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def sample(slots):
    return Sample.of_texts(slots, TEXTS)


def test_own_bits_are_those_of_transformers(slots, monkeypatch):
    monkeypatch.setattr(slots._engines, "choice", "float")
    sample = Sample.of_texts(slots, TEXTS)
    model, bits, guesses = tiny_causal_lm("llama", VOCABULARY), [], []
    for tokens in sample.tokens.split(sample.cu_segments.diff().tolist()):
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1]
        own = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none") / math.log(2)
        bits.append(torch.cat([torch.tensor([math.nan]), own]))
        guesses.append(torch.cat([torch.tensor([-1]), logits.argmax(-1)]))
    expected = torch.cat(bits)
    # The first token of a segment counts as the mean of the others.
    expected = expected.nan_to_num(float(expected.nanmean()))
    assert torch.allclose(sample.own_bits, expected, rtol=1e-3)
    assert torch.equal(sample.base_guesses, torch.cat(guesses))
    assert sample.texts == [TEXTS[0], TEXTS[2], TEXTS[3]] and sample.vocabulary_bits == math.log2(VOCABULARY)


def test_numbers_of_the_codec_are_those_of_its_own_methods(codec):
    found = ztok_fast.evaluate(codec, TEXTS, 4)
    z = codec.compress(TEXTS, 4)
    tokens = [t for own in codec.tokenize(TEXTS) for t in own]
    free = [t for own in codec.decompress_tokens(z) for t in own]
    assert found.tokens == len(tokens) == z.tokens and found.documents == 3
    assert found.free_running == pytest.approx(sum(a == b for a, b in zip(free, tokens)) / len(tokens))
    predicted, _, loss = teacher_forced(codec.model, z, torch.tensor(tokens))
    assert found.residual_bits == pytest.approx(float(loss.mean()) / math.log(2), rel=1e-5)
    assert found.teacher_forced == pytest.approx((predicted == torch.tensor(tokens)).float().mean().item())
    assert found.plain_rate == pytest.approx(z.rate) and found.ratio == pytest.approx(z.achieved_ratio)
    assert found.efficiency == pytest.approx((found.own_bits - found.residual_bits) / found.rate)
    assert found.total_bits == found.rate + found.residual_bits
    assert found.bytes == sum(map(len, TEXTS))
    if z.slot_offsets is None:
        assert found.rate == found.plain_rate and found.told is None
    else:
        assert found.told == pytest.approx(int((z.codes >= 0).sum()) / len(tokens))


@pytest.mark.parametrize("coding", ["adaptive", "prior"])
def test_stored_bits_are_those_of_the_file(slots, tmp_path, monkeypatch, coding):
    if coding == "prior":
        # The compressor has not been trained: let tables that learn be worse still.
        for module in (ways, learned_records):
            monkeypatch.setattr(module, "encode_slots", lambda *settings, codes=True: bytes(1 << 12))
    one = slots.compress(TEXTS[:1], 2)
    slots.save(one, tmp_path / "x.ztok")
    ((_, _, head),) = records_of(tmp_path / "x.ztok")
    payload = (tmp_path / "x.ztok").read_bytes()[-head.stored :]
    stored = learned_records.read_document(head.kind, head.length, payload, head.digest, slots.config)
    assert stored.coding == (learned_records.PRIOR if coding == "prior" else learned_records.ADAPTIVE)
    assert ways.stored_bits(slots, one)[0] == 8 * len(stored.stream)


def test_score_by_hand(sample, monkeypatch):
    """One token of two segments comes back wrong, one does not come back at all."""
    monkeypatch.setattr(scores, "has_bleu", lambda: False)
    free, predicted = sample.tokens.clone(), sample.tokens.clone()
    free[0] += 1
    free[-1] = -1
    predicted[0] += 1
    ztokens = torch.tensor([len(d) for d in sample.documents])
    ztokens[0] = 10
    monkeypatch.setattr(scores, "LONG_DOCUMENT", 2)
    told = torch.zeros(len(sample), dtype=torch.bool)
    told[:3] = True
    found = score(
        sample, CODEC, 1.0, Outcome(100.0, 120.0, torch.full((len(sample),), 0.5), predicted, free, told, ztokens)
    )
    n, segments = len(sample), len(sample.cu_segments) - 1
    assert found.free_running == pytest.approx(1 - 2 / n) and found.teacher_forced == pytest.approx(1 - 1 / n)
    assert found.exact_segments == pytest.approx(1 - 2 / segments)
    assert (found.rate, found.plain_rate, found.residual_bits) == (100 / n, 120 / n, 0.5)
    assert found.told == 3 / n and found.bleu is None
    assert found.ratio == pytest.approx(n / int(ztokens.sum()))
    # The first document has several tokens a Z-token and not one; the second has one; the third is short.
    assert (found.near, found.long_documents) == (0.5, 2)
    assert found.efficiency == pytest.approx((found.own_bits - 0.5) * n / 100)
    assert set(found.to_dict()) >= {"efficiency", "total_bits", "own_bits"}


def test_bleu_is_that_of_the_texts(sample):
    pytest.importorskip("sacrebleu")
    assert scores.bleu(sample, sample.tokens) == pytest.approx(100.0)
    assert scores.bleu(sample, torch.full_like(sample.tokens, -1)) == 0.0


def test_without_the_compressor_the_rarest_tokens_are_written(slots, sample):
    z = ways.compressed(sample, 4)
    other = ways.dearest(sample, z, ways.rarity(sample))
    told, named = ways.told_tokens(z), ways.told_tokens(other)
    assert torch.equal(ways.ztokens_of_documents(sample, other), ways.ztokens_of_documents(sample, z))
    counts = torch.bincount(sample.tokens)[sample.tokens]
    for section in range(len(sample.sections)):
        own = sample.section == section
        assert int(named[own].sum()) <= int(told[own].sum())
    # A unit holds few tokens and a segment has one at least: with one segment it is the rarest that are written.
    first = sample.section == len(sample.sections) - 2
    assert int(sample.cu_sections.diff()[-2]) == 1
    assert counts[first & named].max() <= counts[first & ~named].min()
    found = ztok_fast.evaluate(slots, TEXTS, 4, without="compressor")
    assert found.told == pytest.approx(float(named.double().mean())) and found.way == COMPRESSOR


def test_without_the_decompressor_the_commonest_token_stands_elsewhere(slots, sample):
    z = ways.compressed(sample, 8)
    told = ways.told_tokens(z)
    rest = sample.tokens[~told].tolist()
    common = max(set(rest), key=lambda t: (rest.count(t), -t))
    found = ztok_fast.evaluate(slots, TEXTS, 8, without="decompressor")
    right = int(told.sum()) + rest.count(common)
    assert found.free_running == found.teacher_forced == pytest.approx(right / len(sample))
    entropy = -sum(math.log2(rest.count(t) / len(rest)) for t in rest)
    assert found.residual_bits == pytest.approx(entropy / len(sample)) and found.way == DECOMPRESSOR


def test_pooled_units_without_their_language_models(pooled):
    sample = Sample.of_texts(pooled, TEXTS)
    before = {name: value.clone() for name, value in pooled.model.codec_state().items()}
    found = ztok_fast.evaluate(pooled, TEXTS, 2, without="compressor")
    assert all(torch.equal(before[name], value) for name, value in pooled.model.codec_state().items())
    with torch.no_grad():
        gain = pooled.model.hidden_gain.item()
        pooled.model.hidden_gain.fill_(0.0)
        z = compress_documents(pooled.model, sample.sections, 2.0)
        pooled.model.hidden_gain.fill_(gain)
    free = torch.tensor([t for own in decompress_documents(pooled.model, z) for t in own])
    assert found.free_running == pytest.approx((free == sample.tokens).double().mean().item())
    z = ways.compressed(sample, 2)
    _, bias = pooled.model.conditioning(pooled.model.embed(z), z, len(sample))
    words = pooled.model.adapted.model.get_output_embeddings().weight
    expected = ((bias @ words.T).argmax(-1) == sample.tokens).double().mean().item()
    assert ztok_fast.evaluate(pooled, TEXTS, 2, without="decompressor").free_running == pytest.approx(
        expected, abs=0.05
    )
    assert OPEN_LOOP not in ways_of(pooled) and DECOMPRESSOR not in ways_of(tiny_codec())


def test_every_way_at_every_ratio(codec):
    sample = Sample.of_texts(codec, TEXTS)
    ticks = []
    rows = list(compare(codec, sample, [2.0, 4.0], progress=ticks.append))
    assert [(row.asked, row.way) for row in rows] == [(r, w) for r in (2.0, 4.0) for w in ways_of(codec)]
    assert ticks == [len(sample)] * len(rows)
    for row in rows:
        assert 0 <= row.free_running <= 1 and row.own_bits == rows[0].own_bits
    if codec.config.emission == "slots":
        assert ways_of(codec) == WAYS


@pytest.fixture
def guessable(slots) -> list[list[int]]:
    """Texts of which the decompressor guesses a good part: what it writes itself around some random tokens."""
    slots._engines.use()
    tokens = pack_tokens(packed_documents(slots, [64, 40, 16, 5], seed=3), "cpu")
    told = torch.rand(len(tokens), generator=torch.Generator().manual_seed(1)) < 0.3
    cu, documents = offsets(torch.tensor([16] * 6 + [8, 16, 5])), torch.tensor([0, 4, 7, 8, 9], dtype=torch.int32)
    z = fill_slots(tokens, told, cu, documents, slots.config.num_codebooks)
    # None of them is token 0, which a model with equal logits guesses.
    return [[token or 3 for token in own] for own in decompress_documents(slots.model, z)]


def test_a_codec_whose_language_model_does_nothing_is_found_out(slots, guessable):
    """It has to write everything for an exact copy, and otherwise is as good as the commonest token elsewhere."""

    def rows(codec, ratio):
        codec._engines.use()
        sample = Sample(codec, [""] * len(guessable), guessable)
        z = compress_documents(codec.model, sample.sections, ratio)
        outcomes = [ways.restored(sample, z), ways.without_decompressor(sample, z)]
        return [score(sample, CODEC, ratio, outcome) for outcome in outcomes]

    nothing = tiny_codec(**SLOTS)
    nothing._engines.choice = "float"
    with torch.no_grad():
        # Equal logits for all tokens: it guesses token 0.
        nothing.model.adapted.model.get_input_embeddings().weight.zero_()
    exact, without = rows(slots, 1.0)
    assert exact.free_running == exact.teacher_forced == exact.exact_segments == 1.0
    assert without.free_running < 1.0, "some tokens are guessed, and not by their frequency"
    everything, _ = rows(nothing, 1.0)
    assert everything.free_running == everything.told == 1.0 and exact.told < 1.0
    blind, commonest = rows(nothing, 8.0)
    assert blind.free_running == blind.told < commonest.free_running
    # It saves nothing but the tokens that are told, each of which costs all of its bits.
    assert blind.own_bits == pytest.approx(math.log2(VOCABULARY), rel=1e-5)
    assert blind.residual_bits == pytest.approx(blind.own_bits * (1 - blind.told), rel=1e-5)
    assert (blind.own_bits - blind.residual_bits) / blind.plain_rate < 1


def test_mistakes(slots):
    for arguments, message in (
        ((["a text"], 4, "language model"), "without: expected None, 'compressor' or 'decompressor'"),
        ((["a text"], 0.5), "ratio: expected between 1 and"),
        (([], 4), "texts: expected at least one with a token, got none in 0"),
        ((["", ""], 4), "got none in 2"),
        (("a text", 4), "expected a list of strings, got one str"),
    ):
        options = {"without": arguments[2]} if len(arguments) > 2 else {}
        with pytest.raises(ValueError, match=message):
            ztok_fast.evaluate(slots, *arguments[:2], **options)
    with pytest.raises(ValueError, match="expected None or 'compressor'"):
        ztok_fast.evaluate(tiny_codec(), ["a text"], 4, without="decompressor")
