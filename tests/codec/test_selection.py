"""The closed loop: what is written, so that the decompressor's guesses are right or the budget is used well."""

import pytest
import torch

from tests.codec.tiny_codec import tiny_codec
from tests.codec.tiny_slots import SEGMENT, SLOTS, TEXTS, VOCABULARY, guessable_texts, tiny_slot_codec
from ztok_fast.codec.config import ConfigError, ZTokConfig
from ztok_fast.codec.errors import CodecError, ZBatchError
from ztok_fast.codec.focus import KEPT
from ztok_fast.codec.layout import offsets, sequence_of_row
from ztok_fast.codec.passes import compress_documents, decompress_documents, teacher_forced
from ztok_fast.codec.selection import _shared, choose_ztokens, close, grow, guess, harm, is_right, sums, within_budget
from ztok_fast.codec.zbatch import ZBatch
from ztok_fast.profiling import profile


@pytest.fixture(scope="module")
def codec():
    return tiny_slot_codec()


@pytest.fixture(params=["int8", "float32", "float"])
def engine(codec, request, monkeypatch):
    monkeypatch.setattr(codec._engines, "choice", request.param)
    codec._engines.use()
    return request.param


@pytest.fixture
def guessable(codec) -> list[list[int]]:
    return guessable_texts(codec)


def packed(documents):
    lengths = [min(SEGMENT, len(d) - at) for d in documents for at in range(0, len(d), SEGMENT)]
    return torch.tensor([t for d in documents for t in d]), offsets(torch.tensor(lengths))


def test_the_loop_closes_and_leaves_guesses_to_the_decompressor(codec, engine, guessable):
    tokens, cu = packed(guessable)
    written, _ = close(codec.model, tokens, cu)
    assert guess(codec.model, tokens, written, cu).right.all()
    assert not written.all(), "some tokens are guessed"


@pytest.mark.parametrize("ratio", [1, 1.7, 2])
@pytest.mark.parametrize("fixed_units", [False, True])
def test_low_ratios_come_back_exactly_without_corrections(codec, engine, guessable, ratio, fixed_units):
    # Two slots a unit hold every token of two.
    z = compress_documents(codec.model, guessable, ratio, fixed_units=fixed_units)
    assert [d.tolist() for d in decompress_documents(codec.model, z)] == guessable
    if fixed_units:
        assert (z.unit_lengths < ratio + 1).all()


@pytest.mark.parametrize("ratio", [4, 8, 16])
def test_high_ratios_keep_the_budget_and_what_is_written(codec, guessable, ratio):
    z = compress_documents(codec.model, guessable, ratio)
    tokens, _ = packed(guessable)
    units = z.cu_ztokens.diff()
    for count, document, segments in zip(units.tolist(), guessable, z.cu_documents.diff().tolist()):
        assert segments <= count <= max(segments, len(document) / ratio)
    named = codec.model.written(z)
    assert torch.equal(named[named >= 0], tokens[named >= 0])
    predicted, _, loss = teacher_forced(codec.model, z, tokens)
    assert torch.equal(predicted[named >= 0], tokens[named >= 0]) and (loss[named >= 0] == 0).all()


def test_right_tokens_are_those_of_the_guesses(codec, engine, guessable):
    tokens, cu = packed(guessable)
    written = torch.rand(len(tokens), generator=torch.Generator().manual_seed(2)) < 0.5
    right = guess(codec.model, tokens, written, cu).right
    assert torch.equal(is_right(codec.model, tokens, written, cu), right)
    assert right[~written].any() and not right.all()


@pytest.mark.parametrize("engine", ["int8", "float32"], indirect=True)
def test_told_tokens_need_no_steps(codec, engine, guessable, monkeypatch):
    """One pass for each token to guess, and the text that steps write."""
    z = compress_documents(codec.model, guessable, 4)
    guesses = (codec.model.written(z) < 0).int()
    first = z.cu_text[:-1].long()
    with profile() as found:
        text = decompress_documents(codec.model, z)
    # And one over each prefix, which predicts the first token.
    assert found.passes == len(first) + int(guesses.sum() - guesses[first].sum()) < z.cu_text[-1]
    monkeypatch.setattr("ztok_fast.codec.runtime.EngineSession.draft", lambda *settings: None)
    with profile() as steps:
        assert decompress_documents(codec.model, z) == text
    assert steps.passes == z.cu_text[-1]


def test_segments_at_their_limit_are_left_as_they_are(codec, engine, guessable):
    tokens, cu = packed(guessable)
    segment, count = sequence_of_row(cu, len(tokens)), len(cu) - 1
    start = torch.zeros_like(tokens, dtype=torch.bool)
    whole = grow(codec.model, tokens, cu, start)
    limit = sums(whole, segment, count) + (torch.arange(count) % 2)
    limited = grow(codec.model, tokens, cu, start, limit=limit)
    below = (limit > sums(whole, segment, count))[segment]
    assert torch.equal(limited[below], whole[below])
    assert (sums(limited, segment, count) >= limit)[::2].all()
    assert torch.equal(grow(codec.model, tokens, cu, start, limit=torch.zeros(count)), start)


def test_words_of_a_large_vocabulary_have_the_bits_of_the_table(codec, engine, guessable, monkeypatch):
    runtime = codec.model.runtime
    tokens = torch.tensor([[3, 7], [3, 250]])
    found = []
    for limit in (1 << 23, 0):
        monkeypatch.setattr("ztok_fast.codec.runtime.WORD_TABLE", limit)
        table, rows = runtime.linear_of_words(codec.model.ahead_projection, tokens)
        found.append(table[rows])
    assert torch.equal(*found)


def test_tokens_to_keep_are_written_at_any_ratio(codec, guessable):
    tokens, cu = packed(guessable[:1])
    weights = torch.ones(len(tokens))
    weights[20:24] = KEPT
    documents = torch.tensor([0, len(cu) - 1], dtype=torch.int32)
    z = choose_ztokens(codec.model, tokens, cu, documents, torch.tensor([16.0]), weights=weights)
    assert torch.equal(codec.model.written(z)[20:24], tokens[20:24])


def test_units_go_where_their_tokens_are_dearest():
    """Two documents: 2 and 1 segments of 4 tokens, 2 slots; the second has no unit to choose."""
    price = torch.tensor([5.0, 1.0, 4.0, 1.0, 3.0, 3.0, 3.0, 0.5, 9.0, 9.0, 9.0, 9.0])
    written = torch.ones(12, dtype=torch.bool)
    written[1] = False
    cu, documents = (torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 8, 12], [0, 2, 3]))
    chosen = within_budget(price, written, cu, documents, torch.tensor([3, 1]), 2)
    # First the dearest two of each segment; then the rest of the second (3 and 0.5) before that of the first (1).
    assert chosen.int().tolist() == [1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0]


def test_a_wrong_token_harms_the_guesses_after_it():
    written = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0]).bool()
    cu = torch.tensor([0, 5, 8], dtype=torch.int32)
    following = (harm(written, cu) - 1)[written]
    assert (following / following[0]).tolist() == [1.0, 0.0, 0.0]


def test_texts_through_files(codec, engine, tmp_path):
    for ratio, exact in ((1, False), (8, True), (16, True)):
        codec.save(codec.compress(TEXTS, ratio, exact), tmp_path / "x.ztok")
        z = codec.load(tmp_path / "x.ztok")
        assert codec.decompress(z) == TEXTS
        assert [one.slot_offsets.shape for one in z] == [one.codes.shape for one in z]
    assert z == ZBatch.concatenate(list(z))


def test_generated_ztokens_are_slots(codec, engine):
    z = codec.compress(TEXTS[:2], 4)
    new, again = (codec.generate(z, 5, temperature=1.0, seed=3, end_threshold=1.0) for _ in range(2))
    assert new == again
    assert new.ztokens and (new.codes[:, 0] >= 0).all()
    assert all(isinstance(text, str) for text in codec.decompress(new))
    assert len(codec.answer(z, "what?", 3)) == 2


def broken(z: ZBatch, **changed) -> ZBatch:
    return ZBatch(**(vars(z) | changed))


def test_slots_that_do_not_fit_are_refused(codec):
    z = codec.compress(TEXTS[:1], 1)
    gap = z.codes.clone()
    gap[:, 0], gap[:, 1] = -1, 3
    late, twice = z.slot_offsets.clone(), z.slot_offsets.clone()
    late[0, 0] = z.unit_lengths[0]
    row = int((z.codes[:, 1] >= 0).int().argmax())
    twice[row, 1] = twice[row, 0]
    for changed, message in (
        ({"slot_offsets": z.slot_offsets[:, :1]}, "slot_offsets: expected int32"),
        ({"codes": gap}, "first slots of a Z-token"),
        ({"slot_offsets": late}, "past its length"),
        ({"codes": z.codes.clamp(max=-1)}, "-1 at slots that are not filled"),
        ({"codes": z.codes + VOCABULARY}, "codes: expected -1 to"),
    ):
        with pytest.raises(ZBatchError, match=message):
            broken(z, **changed).validate()
    if bool((z.codes[:, 1] >= 0).any()):
        with pytest.raises(ZBatchError, match="rise"):
            broken(z, slot_offsets=twice).validate()
    with pytest.raises(CodecError, match="levels: expected None"):
        codec.compress(TEXTS, levels=1)


def test_settings_of_slots():
    with pytest.raises(ConfigError, match="max_unit_length: expected at least segment_length"):
        ZTokConfig(emission="slots", segment_length=64, max_unit_length=32)
    with pytest.raises(ConfigError, match="codebook_size: expected the base model's"):
        tiny_codec(**(SLOTS | {"codebook_size": 16}))


def test_spans_that_are_kept_come_back(codec):
    text = "a text of small words, as texts go: 3.50 and a few merges"
    spans = [[(36, 40), (0, 1)], []]
    z = codec.compress([text, text], 16, keep=spans)
    assert codec.compress([text] * 2, 16, keep=[[], []]) == codec.compress([text] * 2, 16)
    tokens = codec.tokenize([text])[0]
    ends = [len(codec.tokenizer.decode(tokens[: i + 1])) for i in range(len(tokens))]
    named = codec.model.written(z[0])
    for begin, end in spans[0]:
        inside = [i for i, stop in enumerate(ends) if stop > begin and (ends[i - 1] if i else 0) < end]
        assert inside and all(int(named[i]) == tokens[i] for i in inside)
    assert (codec.model.written(z[1]) >= 0).sum() < (named >= 0).sum(), "only the document that asks"


def test_slots_go_where_the_question_points(codec):
    text = "the small cat sat there. " * 4 + "the dog merges texts. " + "the small cat sat there. " * 4
    about = text.index("dog")
    plain, asked = (codec.compress([text], 12, question=q) for q in ("where?", "What does the dog merge?"))
    ends = torch.tensor([len(codec.tokenizer.decode(own)) for own in _prefixes(codec.tokenize([text])[0])])
    there = (ends > about) & (ends <= about + len("dog merges"))
    counts = [(codec.model.written(z) >= 0)[there].sum() for z in (plain, asked)]
    assert counts[1] > counts[0]
    assert asked.ztokens <= plain.ztokens


def _prefixes(tokens):
    return [tokens[: i + 1] for i in range(len(tokens))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": [[(0, 99)]]}, "keep.0.: expected spans"),
        ({"keep": [[(3, 1)]]}, "keep.0.: expected spans"),
        ({"keep": [[1]]}, "keep.0.: expected spans"),
        ({"keep": []}, "keep: expected one for each of 1"),
        ({"question": ["a", "b"]}, "question: expected one for each of 1"),
        ({"question": [3]}, "question.0.: expected a string"),
    ],
)
def test_wrong_wishes_are_refused(codec, options, message):
    with pytest.raises(CodecError, match=message):
        codec.compress(["a text"], 4, **options)


def test_pooled_units_name_no_tokens_to_keep():
    with pytest.raises(CodecError, match="keep, question: expected neither"):
        tiny_codec().compress(["a"], 2, question="what?")


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_slots_of_one_instruction_set_decode_under_each_other(codec, guessable, monkeypatch, precision):
    monkeypatch.setattr(codec._engines, "choice", precision)
    codec._engines.use()
    before = torch.ops.ztok.isa_native(-1)
    found = [isa for isa in (0, 1, 2) if torch.ops.ztok.isa_native(isa) == isa]
    try:
        for writer in found:
            torch.ops.ztok.isa_native(writer)
            z = compress_documents(codec.model, guessable, 2)
            for reader in found:
                torch.ops.ztok.isa_native(reader)
                assert [d.tolist() for d in decompress_documents(codec.model, z)] == guessable, (writer, reader)
    finally:
        torch.ops.ztok.isa_native(before)


def test_units_to_spare_are_no_more_than_the_document_has():
    """One segment needs more than its even share; the others give back what they have beyond their needs."""
    share, needed = torch.tensor([2, 2, 2, 3, 3]), torch.tensor([1, 4, 1, 1, 2])
    document, wanted = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([6, 6])
    assert _shared(share, needed, document, wanted).tolist() == [1, 4, 1, 3, 3]
    assert _shared(share, needed, document, torch.tensor([7, 4])).tolist() == [1, 4, 2, 1, 3]
    assert _shared(share[:0], needed[:0], document[:0], wanted[:0]).tolist() == []
