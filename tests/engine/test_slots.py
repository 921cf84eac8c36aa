"""Z-tokens of slots in compiled code: the bits of the specification, whatever the batch and the processor."""

import numpy as np
import pytest
import torch

from tests.codec.tiny_slots import TEXTS, VOCABULARY, tiny_slot_codec
from tests.engine import oracle
from tests.engine.conftest import instruction_sets
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.slot_choices import SlotChoices
from ztok_fast.codec.slot_space import GAPS, SlotSpaceHead

WIDTH, ROWS = 32, 7
RULES = [
    {"temperature": 0.0, "top_p": 1.0, "allow_end": True},
    {"temperature": 0.0, "top_p": 1.0, "allow_end": False},
    {"temperature": 5.0, "top_p": 1.0, "allow_end": True},
    {"temperature": 9.0, "top_p": 0.6, "allow_end": False},
]


def random_head(latent: int, words: int, longest: int, sharp: float = 60.0) -> tuple[SlotSpaceHead, torch.Tensor]:
    """A head whose choices are far from uniform and fill few slots or many, and the embeddings of its words."""
    generator = torch.Generator().manual_seed(words)
    sizes = {"latent_dim": latent, "max_unit_length": longest, "segment_length": longest}
    config = ZTokConfig(emission="slots", num_codebooks=3, codebook_size=words, **sizes)
    head = SlotSpaceHead(WIDTH, config, 1.0)
    with torch.no_grad():
        for own in head.parameters():
            own.copy_(torch.randn(own.shape, generator=generator))
        head.queries.mul_(sharp / WIDTH)
        # Small gaps are likelier, so that several slots fit.
        head.gap_rows[:, 4:GAPS].mul_(0.3)
    return head, torch.randn(words, WIDTH, generator=generator) / WIDTH**0.5


def choose(choices: SlotChoices, hidden, rule, ids, step=3):
    return choices.select(hidden, seed=5, row_ids=ids, step=step, **rule)


def numpy_tables(choices: SlotChoices, head: SlotSpaceHead) -> dict:
    return {
        "queries": head.queries.detach().numpy(),
        "gap_rows": head.gap_rows.detach().numpy(),
        "word_rows": choices._tables[-1].numpy(),
    }


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("latent", "words", "longest"), [(8, 41, 9), (32, 700, 64)])
def test_choices_have_the_bits_of_the_specification(machine, rule, latent, words, longest):
    head, embedding = random_head(latent, words, longest)
    hidden, ids = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)), torch.arange(ROWS) * 3
    for isa in instruction_sets():
        machine(isa, 2 if isa else 1)
        choices = SlotChoices(head, embedding)
        tables = numpy_tables(choices, head)
        expected_rows = oracle.ordered_linear(embedding.numpy(), head.words.weight.detach().numpy())
        assert np.array_equal(tables["word_rows"].view(np.int32), expected_rows.view(np.int32))
        codes, lengths, places, ends = choose(choices, hidden, rule, ids)
        for row in range(ROWS):
            options = longest, rule["allow_end"], rule["temperature"], rule["top_p"], 5, int(ids[row]), 3
            own = oracle.slots(hidden[row].numpy(), tables, *options)
            assert (codes[row].tolist(), places[row].tolist(), int(lengths[row]), float(ends[row])) == own
    filled = (codes >= 0).sum(1)
    assert int(filled.min()) < int(filled.max()), "expected rows that fill few slots, and rows that fill many"


@pytest.mark.parametrize("rule", RULES)
def test_a_row_does_not_depend_on_the_others(rule):
    head, embedding = random_head(32, 700, 64)
    choices, ids = SlotChoices(head, embedding), torch.arange(150) + 2**40
    hidden = torch.randn(150, WIDTH, generator=torch.Generator().manual_seed(2))
    together = choose(choices, hidden, rule, ids)
    for rows in (torch.tensor([149]), torch.arange(0, 150, 7), torch.arange(149, -1, -1)):
        for all_rows, own in zip(together, choose(choices, hidden[rows], rule, ids[rows])):
            assert torch.equal(all_rows[rows], own)
    assert [len(own) for own in choose(choices, hidden[:0], rule, ids[:0])] == [0] * 4


def test_draws_depend_on_row_id_and_step():
    head, embedding = random_head(32, 700, 64, sharp=10.0)
    choices, rule = SlotChoices(head, embedding), {**RULES[2], "temperature": 10.0}
    hidden = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(3)).expand(40, -1)
    codes = choose(choices, hidden, rule, torch.arange(40))[0]
    assert len(codes.unique(dim=0)) > 20
    assert torch.equal(codes[:1].expand(40, -1), choose(choices, hidden, rule, torch.zeros(40).long())[0])
    assert not torch.equal(codes, choose(choices, hidden, rule, torch.arange(40), step=4)[0])


def test_the_likeliest_choices_are_those_of_the_head_in_pytorch():
    head, embedding = random_head(32, 700, 64)
    choices = SlotChoices(head, embedding)
    hidden = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(4))
    rest = {"seed": 0, "row_ids": torch.arange(60), "step": 0, "temperature": 0.0, "top_p": 1.0}
    for allow_end in (True, False):
        codes, lengths, places, ends = choices.select(hidden, allow_end=allow_end, **rest)
        expected = head.select(hidden, embedding, allow_end=allow_end, **rest)
        for own, other in zip((codes, lengths, places), expected):
            assert torch.equal(own, other)
        if allow_end:
            assert torch.equal(ends.bool(), expected[3])
        else:
            torch.testing.assert_close(ends.float(), head.end_mass(hidden), atol=1e-6, rtol=1e-5)


def test_rows_without_a_choice_and_bad_numbers_are_errors():
    head, embedding = random_head(8, 41, 9)
    choices = SlotChoices(head, embedding)
    hidden = torch.zeros(3, WIDTH)
    hidden[1, 2] = torch.nan
    for rule in RULES:
        with pytest.raises(RuntimeError, match="row 1: expected finite logits, got NaN or infinity"):
            choose(choices, hidden, rule, torch.arange(3))
    for bad, message in (({"top_p": 0.0}, "top_p must be a number in"), ({"temperature": -1.0}, "temperature must be")):
        with pytest.raises(ValueError, match=message):
            choose(choices, hidden, {**RULES[0], **bad}, torch.arange(3))
    with pytest.raises(RuntimeError, match=r"row_ids: expected a contiguous Long tensor \[3\]"):
        choose(choices, hidden, RULES[0], torch.arange(4))


def test_changed_parameters_are_packed_anew():
    head, embedding = random_head(8, 41, 9)
    choices = SlotChoices(head, embedding)
    assert not choices.stale
    with torch.no_grad():
        head.gap_rows[0, GAPS].add_(1)
    assert choices.stale


def test_input_rows_have_the_bits_of_the_sum_in_pytorch(machine):
    codec = tiny_slot_codec()
    model, generator = codec.model, torch.Generator().manual_seed(5)
    z = codec.compress(TEXTS, ratio=2)
    z.codes, z.slot_offsets = z.codes.clone(), z.slot_offsets.clone()
    z.codes[torch.rand(z.codes.shape, generator=generator) < 0.3] = -1
    z.slot_offsets[z.codes < 0] = -1
    with torch.no_grad():
        table, rows = model.runtime.linear_of_words(model.slot_projection, z.codes.clamp(min=0).long())
        total = torch.zeros(z.ztokens, table.shape[1])
        for slot in range(z.codes.shape[1]):
            places = model.slot_places(z.slot_offsets[:, slot].clamp(0, len(model.slot_places.weight) - 1).long())
            own = table[rows[:, slot]] * model.slot_gates[slot] + places
            total = total + torch.where((z.codes[:, slot] >= 0)[:, None], own, 0.0)
        total = torch.where(z.codes[:, :1] >= 0, total, model.start_embedding)
        assert model.runtime.exact
        for isa in instruction_sets():
            machine(isa, 2)
            assert torch.equal(model.embed(z), total)
    with pytest.raises(RuntimeError, match="index: expected 0 to"):
        torch.ops.ztok.engine_slot_rows(
            table[:1],
            torch.ones_like(rows),
            torch.ones_like(z.codes),
            z.slot_offsets,
            model.slot_gates,
            table,
            table[0],
        )


@pytest.mark.parametrize("end_threshold", [None, 1.0])
def test_a_codec_of_slots_continues_a_document_alike_in_every_batch(end_threshold):
    codec = tiny_slot_codec()
    z = codec.compress(TEXTS, ratio=2)
    settings = {"temperature": 0.9, "top_p": 0.95, "seed": 3, "end_threshold": end_threshold}
    together = codec.generate(z, 6, **settings)
    for index in range(len(TEXTS)):
        assert codec.generate(z[index], 6, **settings) == together[index]
    if end_threshold == 1.0:
        assert together.cu_ztokens.diff().tolist() == [6] * len(TEXTS)
        assert int(together.codes.max()) < VOCABULARY
    assert len(codec.decompress(together)) == len(TEXTS)
