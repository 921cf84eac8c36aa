"""What is read to answer a question, who reads it, and that ways differ in nothing else."""

import pytest
import torch

import ztok_fast
from tests.codec.tiny_codec import tiny_base, tiny_codec
from tests.codec.tiny_slots import tiny_slot_codec
from ztok_fast.codec.slots import written_tokens
from ztok_fast.evaluation import contexts
from ztok_fast.evaluation.contexts import (
    ANSWER_WAYS,
    DECOMPRESSED,
    FULL,
    NOTHING,
    POOLED,
    RARE,
    SURPRISING,
    TRUNCATED,
    WRITTEN,
    ZTOKENS,
    Contexts,
    answer_ways_of,
    mean_pooled,
)
from ztok_fast.evaluation.questions import token_f1
from ztok_fast.evaluation.readers import BaseReader, InferencerReader, reader_of
from ztok_fast.evaluation.sample import Sample

TEXTS = ["a small text to learn a few merges from", "the text is small; as small texts go, it is the text"]
QUESTIONS = ["what is small?", "how do texts go?"]
ITEMS = [{"text": t, "question": q, "answer": "a few merges"} for t, q in zip(TEXTS, QUESTIONS)]
RATIO = 4


@pytest.fixture(scope="module")
def codec():
    return tiny_slot_codec()


@pytest.fixture(scope="module")
def scores(codec):
    done = []
    found = ztok_fast.evaluate_answers(codec, ITEMS, RATIO, max_new_tokens=6, progress=done.append)
    assert sum(done) == len(ITEMS) * len(found)
    return {score.way: score for score in found}


def contexts_of(codec, reader=None) -> Contexts:
    return Contexts(Sample.of_texts(codec, TEXTS), codec.compress(TEXTS, RATIO), reader_of(reader, codec))


def test_every_way_is_scored(scores):
    assert tuple(scores) == ANSWER_WAYS
    for score in scores.values():
        values = [token_f1(answer, ["a few merges"]) for answer in score.answers]
        assert score.f1 == pytest.approx(sum(values) / 2) and score.f1_low <= score.f1 <= score.f1_high
        assert (score.items, score.asked, score.reader) == (2, RATIO, "inferencer")
        assert "answers" not in score.to_dict() and score.to_dict()["f1"] == score.f1


def test_answers_from_ztokens_are_those_of_the_codec(codec, scores):
    z = codec.compress(TEXTS, RATIO)
    assert list(scores[ZTOKENS].answers) == codec.answer(z, QUESTIONS, max_new_tokens=6)
    assert scores[ZTOKENS].positions == int((z.codes >= 0).sum()) / 2


def test_positions_are_those_of_the_slots(codec, scores):
    z = codec.compress(TEXTS, RATIO)
    counts = [int((own.codes >= 0).sum()) for own in z]
    found = contexts_of(codec)
    for way in ANSWER_WAYS:
        sizes = [len(rows) for rows in found.rows(way)]
        assert scores[way].positions == pytest.approx(sum(sizes) / 2)
        if way in (FULL, DECOMPRESSED):
            read = TEXTS if way == FULL else codec.decompress(found.z)
            assert sizes == [len(tokens) for tokens in codec.tokenize(read)]
        elif way in (ZTOKENS, POOLED, TRUNCATED):
            assert sizes == counts
        else:
            assert all((size == 0) == (way == NOTHING) and size <= k for size, k in zip(sizes, counts)), way


def test_the_reader_sees_what_the_way_says(codec):
    found, words = contexts_of(codec), codec.model.adapted.embedding.weight
    tokens = [list(own) for own in codec.tokenize(TEXTS)]
    counts = found.positions
    assert all(torch.equal(rows, words[own]) for rows, own in zip(found.rows(FULL), tokens))
    assert [list(own) for own in found.tokens(TRUNCATED)] == [own[:k] for own, k in zip(tokens, counts)]
    named = written_tokens(found.z).split([len(t) for t in tokens])
    for text, own, k in zip(found._written_texts(), named, counts):
        assert text == codec._text_bytes(own[own >= 0].tolist()).decode().strip() and int((own >= 0).sum()) == k


def test_means_of_equal_stretches():
    rows = torch.arange(10.0).view(5, 2)
    expected = torch.stack([rows[:2].mean(0), rows[2:4].mean(0), rows[4]])
    assert torch.equal(mean_pooled(rows, 3), expected)
    assert torch.equal(mean_pooled(rows, 9), rows)


def test_the_dearest_words_are_kept_in_order(codec, monkeypatch):
    found = contexts_of(codec)
    sizes = [[len(own) for own in codec.tokenize([f" {word}" for word in text.split()])] for text in TEXTS]
    for text, own, kept in zip(TEXTS, sizes, found._chosen([[float(i) for i in range(len(s))] for s in sizes])):
        # The last words are the dearest; shorter ones before may fill what is left.
        text_kept = codec._text_bytes(kept).decode()
        words = text.split()
        assert text_kept.split()[-1] == words[-1] and len(kept) <= sum(own)
        places = [i for i, word in enumerate(words) if word in text_kept.split()]
        assert places == sorted(places)
    bits = contexts._surprise(found.sample)
    total = sum(map(sum, bits))
    # Spaces between words belong to no word.
    assert 0 < total <= float(found.sample.own_bits.sum()) + 1e-3
    assert [len(own) for own in bits] == [len(text.split()) for text in TEXTS]
    rarity = contexts._rarity(["A b c b", "b"])
    assert rarity[0][1] == rarity[1][0] < rarity[0][0] == rarity[0][2]
    assert found.tokens(SURPRISING) != found.tokens(RARE)


def test_decompressed_text_is_asked_again_only_where_it_differs(codec, monkeypatch):
    asked = []
    plain = InferencerReader.answer

    def spied(self, rows, questions, max_new_tokens):
        asked.append(list(questions))
        return plain(self, rows, questions, max_new_tokens)

    monkeypatch.setattr(InferencerReader, "answer", spied)
    monkeypatch.setattr(Contexts, "decompressed", [TEXTS[0], TEXTS[1] + " changed"])
    full, restored = ztok_fast.evaluate_answers(codec, ITEMS, RATIO, ways=[FULL, DECOMPRESSED], max_new_tokens=4)
    assert asked == [QUESTIONS, QUESTIONS[1:]]
    assert restored.answers[0] == full.answers[0]
    assert (full.same_texts, restored.same_texts) == (1.0, 0.5)


@pytest.mark.parametrize(("family", "precision"), [("llama", "float32"), ("llama", "float"), ("gpt2", "int8")])
def test_a_base_model_goes_on_after_the_examples(codec, family, precision, monkeypatch):
    # A prompt that the tiny models' positions hold.
    monkeypatch.setattr("ztok_fast.evaluation.readers.EXAMPLES", (("so it is", "is it?", "so"),))
    model = tiny_base(family).model
    reader = BaseReader(tiny_base(family), precision)
    rows = [reader.embed(torch.tensor(list(own))) for own in reader.tokenize(TEXTS)]
    before, after = reader._prompt(QUESTIONS[0], True)
    assert reader.tokenizer.decode(before).endswith("Question: is it?\nAnswer: so\n\nText:\n")
    assert reader.tokenizer.decode(after) == f"\n\nQuestion: {QUESTIONS[0]}\nAnswer:"
    for tokens, question, answer in zip(
        [*reader.tokenize(TEXTS), []],
        [*QUESTIONS, "why?"],
        reader.answer([*rows, rows[0][:0]], [*QUESTIONS, "why?"], 6),
    ):
        before, after = reader._prompt(question, bool(tokens))
        ids = [*before, *tokens, *after]
        written = []
        while len(written) < 6:
            with torch.no_grad():
                token = int(model(torch.tensor([[*ids, *written]])).logits[0, -1].argmax())
            if token in reader.end_tokens:
                break
            written.append(token)
        assert answer == reader.tokenizer.decode(written).strip().split("\n")[0].strip()


def test_shares_of_the_full_text_are_for_readers_on_one_base(codec):
    ways = [FULL, ZTOKENS, NOTHING]
    other = tiny_codec(seed=3)
    for reader, same in ((None, True), (other, True), (BaseReader(tiny_base("qwen3")), False)):
        found = {s.way: s for s in ztok_fast.evaluate_answers(codec, ITEMS, 2, reader=reader, ways=ways)}
        # Answers that the full text's reader gets right.
        items = [{**item, "answer": answer or "nothing"} for item, answer in zip(ITEMS, found[FULL].answers)]
        found = {s.way: s for s in ztok_fast.evaluate_answers(codec, items, 2, reader=reader, ways=ways)}
        assert found[FULL].of_full == found[FULL].of_full_low == 1.0
        assert (found[ZTOKENS].of_full is None) == (not same)
        assert found[NOTHING].of_full == pytest.approx(found[NOTHING].f1 / found[FULL].f1)
        assert found[ZTOKENS].reader == "inferencer"


def test_what_cannot_be_asked(codec):
    pooled = tiny_codec()
    assert WRITTEN not in answer_ways_of(pooled) and WRITTEN in answer_ways_of(codec)
    with pytest.raises(ValueError, match="ways: expected some of full text, .*got 'written tokens'"):
        ztok_fast.evaluate_answers(pooled, ITEMS, 2, ways=[WRITTEN])
    with pytest.raises(ValueError, match="reader: expected a base model, its name, a codec or None, got int"):
        ztok_fast.evaluate_answers(codec, ITEMS, 2, reader=3)
    with pytest.raises(ValueError, match="max_new_tokens: expected an integer of at least 1, got 0"):
        ztok_fast.evaluate_answers(codec, ITEMS, 2, max_new_tokens=0)
    with pytest.raises(ValueError, match="ratio: expected between 1"):
        ztok_fast.evaluate_answers(codec, ITEMS, 99)
