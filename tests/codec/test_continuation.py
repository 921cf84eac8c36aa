"""Z-space: continuations that depend on the seed alone, both ways to end, and answers."""

import math

import pytest
import torch

from tests.codec.tiny_codec import packed_documents, tiny_codec
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.continuation import continue_ztokens
from ztok_fast.codec.errors import CodecError
from ztok_fast.codec.zspace import ZSpaceHead

TEXTS = ["The small text goes on. " * 3, "Another text!", "", "x"]


@pytest.fixture
def z(codec):
    return codec.compress(TEXTS, ratio=2)


def test_continuation_decompresses(family_codec):
    z = family_codec.compress(TEXTS, ratio=2)
    new = family_codec.generate(z, max_new_ztokens=6, temperature=1.0, seed=1, end_threshold=1.0)
    assert new.cu_ztokens.diff().tolist() == [6] * 4
    assert [len(t) > 0 for t in family_codec.decompress(new)] == [True] * 4
    assert [d.tokens for d in new.documents] == [int(n.unit_lengths.sum()) for n in new]
    segments = new.unit_lengths.cumsum(0)[(new.cu_segments[1:] - 1).long()].diff()
    assert int(segments.max()) <= family_codec.config.segment_length


def test_same_seed_same_continuation_whatever_else_is_in_the_batch(codec, z):
    together = codec.generate(z, 8, temperature=0.9, top_p=0.95, seed=3)
    assert together == codec.generate(z, 8, temperature=0.9, top_p=0.95, seed=3)
    for index in range(len(TEXTS)):
        assert codec.generate(z[index], 8, temperature=0.9, top_p=0.95, seed=3) == together[index]
    other = codec.generate(z, 8, temperature=0.9, top_p=0.95, seed=4)
    assert not torch.equal(other.codes[: len(together.codes)], together.codes[: len(other.codes)])


def test_no_temperature_is_the_likeliest_whatever_the_seed(codec, z):
    assert codec.generate(z, 5, seed=1) == codec.generate(z, 5, seed=2)


def codec_that_ends(weight: float):
    """A codec whose end-of-Z has the logit ``weight`` against 0 for every code."""
    codec = tiny_codec()
    with torch.no_grad():
        codec.model.codebooks[0].zero_()
        codec.model.zspace.queries.zero_()
        codec.model.zspace.end_row.zero_()
    # A query of zeros gives all rows the same logit; a constant query gives end-of-Z its own.
    codec.model.zspace.level_query = lambda hidden, level, chosen: torch.full((len(hidden), 8), weight / 8)
    with torch.no_grad():
        codec.model.zspace.end_row.fill_(1.0)
    return codec


def test_generation_stops_at_end_of_z():
    codec = codec_that_ends(5.0)
    z = codec.compress(["a text", "b"], ratio=2)
    new = codec.generate(z, 6)
    assert new.ztokens == 0 and codec.decompress(new) == ["", ""]
    never = codec_that_ends(-5.0)
    assert never.generate(never.compress(["a text", "b"], ratio=2), 6).cu_ztokens.diff().tolist() == [6, 6]


def test_generation_stops_where_the_end_mass_reaches_the_threshold(codec, z):
    unending, _ = continue_ztokens(codec.model, z, 10, 0.9, seed=5, end_threshold=1.0)
    assert unending.cu_ztokens.diff().tolist() == [10] * 4, "a softmax never gives end-of-Z all the mass"
    # The end mass of every step, found by letting each step be the last.
    masses = end_masses(codec, z, 10)
    for threshold in (0.02, 0.06, 0.2):
        stopped, infos = continue_ztokens(codec.model, z, 10, 0.9, seed=5, end_threshold=threshold)
        for row, own in enumerate(stopped.part(row) for row in range(4)):
            reached = (masses[row] >= threshold).nonzero()
            expected = int(reached[0]) if len(reached) else 10
            assert own.ztokens == expected
            # What is drawn before the end does not depend on the threshold.
            assert torch.equal(own.codes, unending.part(row).codes[:expected])
            assert infos[row].tokens == int(own.unit_lengths.sum())


def end_masses(codec, z, steps):
    """fp64 ``[B, steps]``, recorded from a run that never ends."""
    masses = []
    head = codec.model.zspace
    recorded = head.end_mass

    def record(hidden, codebooks):
        masses.append(recorded(hidden, codebooks).double())
        return masses[-1].float()

    head.end_mass = record
    try:
        continue_ztokens(codec.model, z, steps, 0.9, seed=5, end_threshold=1.0)
    finally:
        del head.end_mass
    return torch.stack(masses, dim=1)


def test_end_mass_is_the_probability_of_the_end_row():
    torch.manual_seed(0)
    codec = tiny_codec()
    head: ZSpaceHead = codec.model.zspace
    hidden = torch.randn(4, 32)
    with torch.no_grad():
        rows = torch.cat([codec.model.codebooks[0], head.end_row])
        logits = (hidden @ head.queries[0].T) @ rows.T
        mass = head.end_mass(hidden, codec.model.codebooks)
        torch.testing.assert_close(mass, logits.softmax(-1)[:, -1])
        codes, lengths, ended = head.select(
            hidden, codec.model.codebooks, temperature=0.0, top_p=1.0, seed=0, row_ids=None, step=0
        )
    assert torch.equal(ended, logits.argmax(-1) == 16)
    assert torch.equal(codes[~ended, 0].long(), logits[:, :16].argmax(-1)[~ended])
    assert int(lengths.min()) >= 1 and int(lengths.max()) <= 8


def test_answers(codec, z):
    answers = codec.answer(z, "Which text?", max_new_tokens=5)
    assert len(answers) == 4 and all(isinstance(a, str) for a in answers)
    assert codec.answer(z, ["Which text?"] * 4, max_new_tokens=5) == answers
    assert codec.answer(z[1], "Which text?", max_new_tokens=5) == answers[1]
    assert codec.answer(codec.compress([], ratio=2), "?") == []


def test_answer_stops_at_the_end_token(codec):
    from ztok_fast.codec.continuation import answer_question

    z = codec.compress(["The small text."], ratio=2)
    model, question = codec.model, packed_documents(codec, [4])
    config = model.adapted.model.config
    before = config.eos_token_id
    try:
        config.eos_token_id = None
        free = answer_question(model, z, question, 8)[0]
        assert len(free) == 8
        config.eos_token_id = [free[5], len(model.adapted.embedding.weight)]
        assert answer_question(model, z, question, 8)[0] == free[: free.index(free[5])]
    finally:
        config.eos_token_id = before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_ztokens": 0}, "max_new_ztokens: expected an integer of at least 1, got 0"),
        ({"max_new_ztokens": 2.5}, "max_new_ztokens: expected an integer"),
        ({"temperature": -1}, "temperature: expected a finite number of at least 0, got -1"),
        ({"temperature": float("nan")}, "temperature: expected a finite number"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p must be a number in"),
        ({"seed": -1}, "seed must be"),
        ({"end_threshold": 0}, "end_threshold: expected None or a probability"),
        ({"end_threshold": 1.5}, "end_threshold: expected None or a probability"),
    ],
)
def test_bad_arguments_of_generate(codec, z, arguments, message):
    with pytest.raises(ValueError, match=message):
        codec.generate(z, **arguments)


def test_bad_arguments_of_answer(codec, z):
    with pytest.raises(CodecError, match="question: expected one string, or one for each of 4 documents"):
        codec.answer(z, ["one"])
    with pytest.raises(CodecError, match="max_new_tokens: expected an integer of at least 1, got 0"):
        codec.answer(z, "?", max_new_tokens=0)


def test_more_ztokens_than_a_learned_position_table_has_rows():
    codec = tiny_codec("gpt2")
    z = codec.compress(["z" * 200], ratio=2)
    with pytest.raises(CodecError, match="expected at most 128 rows"):
        codec.generate(z, 60)
    with pytest.raises(CodecError, match="expected at most 128 rows"):
        codec.answer(z, "zzzz", 60)


def test_untrained_head_is_near_uniform_even_on_long_hidden_states():
    config = ZTokConfig(num_codebooks=4, codebook_size=256, latent_dim=16)
    torch.manual_seed(0)
    head = ZSpaceHead(64, config, embedding_rms=0.1)
    codes = torch.randint(256, (50, 4), dtype=torch.int32)
    lengths, ends = torch.full((50,), 3, dtype=torch.int32), torch.zeros(50, dtype=torch.bool)
    with torch.no_grad():
        head.length_query.weight.zero_()  # what is under test are the codes
    loss = head.loss(20 * torch.randn(50, 64), codes, lengths, ends, 0.1 * torch.randn(4, 256, 16))
    assert loss.item() == pytest.approx(4 * math.log(256) + math.log(16), abs=0.5)
