"""Z-tokens of slots in compiled code: the bits of the specification, whatever the batch and the processor."""

import pytest
import torch

from tests.codec.tiny_slots import TEXTS, VOCABULARY, tiny_slot_codec
from tests.engine import oracle
from tests.engine.conftest import instruction_sets
from ztok_fast.codec.slots import slot_stream, written_tokens

ROWS = 12
RULES = [
    {"temperature": 0.0, "top_p": 1.0, "allow_end": True},
    {"temperature": 0.0, "top_p": 1.0, "allow_end": False},
    {"temperature": 5.0, "top_p": 1.0, "allow_end": True},
    {"temperature": 9.0, "top_p": 0.6, "allow_end": False},
]


@pytest.fixture(scope="module")
def model():
    """The model of a codec whose gaps are far from even, and end-of-Z likely."""
    codec, generator = tiny_slot_codec(), torch.Generator().manual_seed(1)
    codec._engines.use()
    model = codec.model
    head = model.zspace
    with torch.no_grad():
        for own, scale in ((head.gap_head.weight, 1.0), (head.gap_head.bias, 1.0), (head.gap_biases, 1.0)):
            own.copy_(scale * torch.randn(own.shape, generator=generator))
        head.gap_head.bias[-1] += 10
    return model


def states(model, count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, model.start_embedding.numel(), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def next_row(model, hidden, rule, ids, step=3):
    part, ends, rows = model.next_row(hidden, seed=5, row_ids=ids, step=step, **rule)
    assert torch.equal(part.slot_offsets[:, 0] + 1, part.unit_lengths)
    return part.codes[:, 0], part.slot_offsets[:, 0], ends, rows


@pytest.mark.parametrize("rule", RULES)
def test_slots_have_the_bits_of_the_specification(model, machine, rule):
    head, hidden, ids = model.zspace, states(model, ROWS, 1), torch.arange(ROWS) * 3
    table = [head.gap_head.weight.detach().numpy(), head.gap_head.bias.detach().numpy(), head.longest]
    options = rule["temperature"], rule["top_p"], 5
    for isa in instruction_sets():
        machine(isa, 2 if isa else 1)
        codes, gaps, ends, rows = next_row(model, hidden, rule, ids)
        for row in range(ROWS):
            gap, end = oracle.gap_of_slot(hidden[row].numpy(), *table, rule["allow_end"], *options, int(ids[row]), 3)
            assert (int(gaps[row]), float(ends[row])) == (gap, end)
            with torch.inference_mode():
                logits = model.runtime.logits(hidden[row : row + 1], head.gap_biases[gap : gap + 1])[0]
            assert int(codes[row]) == oracle.choose(logits.numpy(), *options, int(ids[row]), 7)
            word = model.adapted.embedding.weight[int(codes[row])]
            assert torch.equal(rows[row], word + head.gap_rows[gap])
    assert len(gaps.unique()) > 1 and 0 < float(ends.max()), "expected several gaps, and ends"


@pytest.mark.parametrize("rule", RULES)
def test_a_row_does_not_depend_on_the_others(model, rule):
    hidden, ids = states(model, 150, 2), torch.arange(150) + 2**40
    together = next_row(model, hidden, rule, ids)
    for rows in (torch.tensor([149]), torch.arange(0, 150, 7), torch.arange(149, -1, -1)):
        for all_rows, own in zip(together, next_row(model, hidden[rows], rule, ids[rows])):
            assert torch.equal(all_rows[rows], own)


def test_draws_depend_on_row_id_and_step(model):
    rule, hidden = {**RULES[2], "temperature": 10.0}, states(model, 1, 3).expand(40, -1).contiguous()
    codes = next_row(model, hidden, rule, torch.arange(40))[0]
    assert len(codes.unique()) > 20
    assert torch.equal(codes[:1].expand(40), next_row(model, hidden, rule, torch.zeros(40).long())[0])
    assert not torch.equal(codes, next_row(model, hidden, rule, torch.arange(40), step=4)[0])


@pytest.mark.parametrize("rule", RULES)
def test_transformers_modules_and_the_engine_choose_by_one_rule(model, rule):
    logits, ids = states(model, 60, 4), torch.arange(60)
    own = rule["temperature"], rule["top_p"], 5, ids, 3
    with torch.inference_mode():
        assert model.runtime.exact
    assert torch.equal(model.engine.choose(logits, *own), model.float_runtime.choose(logits, *own))
    torch.testing.assert_close(model.engine.last_share(logits), model.float_runtime.last_share(logits))


def test_rows_without_a_choice_and_bad_numbers_are_errors(model):
    hidden = states(model, 3, 5)
    hidden[1, 2] = torch.nan
    for rule in RULES:
        with pytest.raises(ValueError, match="row 1: expected finite logits, got NaN or infinity"):
            next_row(model, hidden, rule, torch.arange(3))
    for bad, message in (({"top_p": 0.0}, "top_p must be a number in"), ({"temperature": -1.0}, "temperature must be")):
        with pytest.raises(ValueError, match=message):
            next_row(model, states(model, 3, 5), {**RULES[0], **bad}, torch.arange(3))
    draw = torch.ops.ztok.engine_draw
    with pytest.raises(RuntimeError, match="row_ids, steps: expected contiguous int64 vectors of 3 elements"):
        draw(hidden, 1.0, 1.0, 0, torch.arange(4), torch.arange(3))
    with pytest.raises(RuntimeError, match="logits: expected a contiguous float32 matrix"):
        draw(hidden.double(), 1.0, 1.0, 0, torch.arange(3), torch.arange(3))


def test_the_inferencer_reads_every_slot_of_a_document():
    z = tiny_slot_codec().compress(TEXTS, ratio=2)
    tokens, gaps, cu = slot_stream(z)
    named = written_tokens(z)
    start = 0
    for document, text in enumerate(z.cu_text[z.cu_documents.long()].tolist()[1:]):
        places = (named[start:text] >= 0).nonzero()[:, 0]
        own = slice(int(cu[document]), int(cu[document + 1]))
        assert torch.equal(gaps[own], places.diff(prepend=torch.tensor([-1])) - 1)
        assert torch.equal(tokens[own], named[start:text][places])
        start = text


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
