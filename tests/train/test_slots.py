"""Training a codec of slots: what learns, what stays, and that a run can be resumed."""

import json
import math

import pytest
import torch

from tests.codec.tiny_codec import tiny_base, tiny_codec
from tests.codec.tiny_slots import SEGMENT, SLOTS
from tests.train.tiny_run import tiny_settings
from ztok_fast.codec.selection import choose_ztokens, close
from ztok_fast.codec.slot_space import GAPS
from ztok_fast.codec.slots import fill_slots
from ztok_fast.train.answer_objective import AnswerObjective
from ztok_fast.train.batches import Section, make_batch
from ztok_fast.train.inferencer import inferencer_losses
from ztok_fast.train.loop import Trainer
from ztok_fast.train.settings import SettingsError
from ztok_fast.train.slot_evaluate import evaluate_compressor, evaluate_inferencer, evaluate_slots
from ztok_fast.train.slot_objective import (
    READ_RATIOS,
    CompressorObjective,
    InferencerObjective,
    SlotObjective,
    draw_ratios,
)

CODEC = SLOTS | {"num_codebooks": 2, "latent_dim": 8, "lora_rank": 2, "budgets": [2.0, 4.0]}


def batch(codec):
    draw = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 270, (n,), generator=draw).tolist() for n in (40, 16, 7)]
    return make_batch([Section(tokens[0], [5, 6], [7]), *map(Section, tokens[1:])], SEGMENT)


def moved(codec) -> set[str]:
    return {
        name
        for name, parameter in codec.model.trainable_parameters().items()
        if parameter.grad is not None and bool(parameter.grad.any())
    }


def test_the_decompressor_learns_to_guess():
    codec = tiny_codec(**SLOTS)
    # Seeds of batches with and without a first pass.
    for seed in range(4):
        terms = SlotObjective(codec.model)(batch(codec), seed)
        terms["total"].backward()
    own = {"slot_projection.weight", "slot_gates", "slot_places.weight", "start_embedding"}
    own |= {"ahead_projection.weight", "ahead_gates", "ahead_places"}
    found = moved(codec)
    assert own <= found
    assert found - own == {n for n in found if ".decompressor." in n} != set()


def test_ztokens_without_slots_do_not_make_gradients_explode():
    """A row of zeros would stay one in every layer, and each norm would multiply its gradient by 300."""
    codec = tiny_codec(**SLOTS)
    model, tokens, cu = codec.model, torch.tensor([7]), torch.tensor([0, 1], dtype=torch.int32)
    z = fill_slots(tokens, tokens < 0, cu, cu, codec.config.num_codebooks)
    assert int(z.codes.max()) == -1
    hidden = model.decompressor_hidden(model.decoder_inputs(model.embed(z), z, tokens, cu))
    hidden.square().mean().backward()
    assert 0 < float(model.start_embedding.grad.norm()) < 1e3
    assert bool(model.embed(z).any())


def test_the_same_seed_gives_the_same_loss():
    codec = tiny_codec(**SLOTS)
    losses = [SlotObjective(codec.model)(batch(codec), seed)["total"].item() for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_the_inferencer_learns_what_comes_next_and_nothing_else():
    codec = tiny_codec(**SLOTS)
    terms = InferencerObjective(codec.model, answer=0.1)(batch(codec), 0)
    terms["total"].backward()
    assert terms["total"].item() == pytest.approx(terms["zspace"].item() + 0.1 * terms["answer"].item())
    assert all(name.startswith("zspace.") or ".inferencer." in name for name in moved(codec))
    own = ("gap_head.weight", "gap_head.bias", "gap_rows", "gap_biases", "marks")
    assert {f"zspace.{name}" for name in own} <= moved(codec)


def test_the_compressor_learns_what_is_written_and_nothing_else():
    codec = tiny_codec(**SLOTS)
    own = [p for n, p in codec.model.trainable_parameters().items() if ".compressor." in n or n.startswith("draft.")]
    optimizer, objective = torch.optim.Adam(own, 0.01), CompressorObjective(codec.model)
    found = []
    for _ in range(12):
        optimizer.zero_grad()
        terms = objective(batch(codec), 0)
        terms["total"].backward()
        optimizer.step()
        found.append(terms["symbols"].item())
        assert terms["total"].item() >= found[-1]
    assert all(name.startswith("draft.") or ".compressor." in name for name in moved(codec))
    assert {"draft.start", "draft.written", "draft.shares", "draft.choice.weight"} <= moved(codec)
    assert found[-1] < 0.7 * found[0]


def test_symbols_cost_bits_and_drafts_are_scored():
    found = evaluate_compressor(tiny_codec(**SLOTS), [torch.randint(3, 270, (64,)).tolist()])
    assert set(found) == {"symbol_bits", "draft_accuracy"}
    assert list(found["symbol_bits"]) == ["4", "8", "16"]
    # Random text: a written token costs nearly log2 of the vocabulary.
    assert found["symbol_bits"]["4"] > found["symbol_bits"]["8"] > found["symbol_bits"]["16"] > 1
    assert 0.1 < found["draft_accuracy"]["16"] < found["draft_accuracy"]["4"] <= 1


@pytest.mark.parametrize("from_text", [False, True])
def test_a_reader_learns_answers_and_nothing_else(from_text):
    codec = tiny_codec(**SLOTS)
    objective, own = AnswerObjective(codec.model, from_text), batch(codec)
    terms = objective(own, 0)
    terms["total"].backward()
    found = moved(codec)
    read = {"zspace.marks"} if from_text else {"zspace.marks", "zspace.gap_rows"}
    assert read <= found and all(n in read or ".inferencer." in n for n in found)
    # Only the section with a question is read, all of its tokens or its Z-tokens.
    section = own.sections[0]
    assert (int(terms["ztokens"]) == len(section.tokens)) == from_text
    words = codec.model.adapted.embedding.weight
    if from_text:
        rows = words[section.tokens]
    else:
        alone = make_batch([section], SEGMENT)
        z = choose_ztokens(
            codec.model, alone.tokens, alone.cu_segments, alone.cu_sections, draw_ratios(READ_RATIOS, 1, 0)
        )
        rows, _ = codec.model.inferencer_rows(z)
    marks, end = codec.model.zspace.marks, codec.model.adapted.end_tokens[:1]
    answer = [*section.answer, *end]
    read = torch.cat([marks[:1], rows, marks[1:2], words[section.question], marks[2:3], words[answer]])
    cu = torch.tensor([0, len(read)], dtype=torch.int32)
    hidden = codec.model.adapted(read, torch.arange(len(read)), cu, len(read), adapter="inferencer")
    logits = codec.model.adapted.logits(hidden[-len(answer) - 1 : -1])
    assert terms["answer"].item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item(), rel=1e-4
    )


def test_a_batch_without_a_question_teaches_nothing():
    codec = tiny_codec(**SLOTS)
    terms = AnswerObjective(codec.model, False)(make_batch([Section([5, 6, 7])], SEGMENT), 0)
    terms["total"].backward()
    assert terms["total"].item() == 0.0 and int(terms["ztokens"]) == 0 and not moved(codec)


@pytest.mark.parametrize("part", ["answers", "answers from text"])
def test_readers_are_trained_by_their_part(tmp_path, part):
    settings = tiny_settings(tmp_path, codec=CODEC, part=part, steps=3, eval_every=0)
    trainer = Trainer(settings, tiny_base())
    before = {n: p.detach().clone() for n, p in trainer.model.trainable_parameters().items()}
    trainer.run()
    changed = {n for n, p in trainer.model.trainable_parameters().items() if not torch.equal(p, before[n])}
    assert changed and all(n in ("zspace.marks", "zspace.gap_rows") or ".inferencer." in n for n in changed)


def test_an_untrained_inferencer_has_even_gaps_and_the_tokens_of_the_base():
    codec, tokens = tiny_codec(**SLOTS), torch.randint(3, 270, (60,))
    with torch.no_grad():
        codec.model.zspace.marks[0] = codec.model.adapted.embedding.weight[7]
    written = torch.ones(60, dtype=torch.bool)
    cu = torch.tensor([0, 60], dtype=torch.int32)
    z = fill_slots(tokens, written, torch.arange(0, 61, 10, dtype=torch.int32), torch.tensor([0, 6]).int(), 4)
    batch_of = make_batch([Section(tokens.tolist())], SEGMENT)
    loss, _ = inferencer_losses(codec.model, batch_of, z, codec.model.embed(z), answers=False)
    hidden = codec.model.runtime.hidden(
        codec.model.adapted.embedding(torch.cat([torch.tensor([7]), tokens[:-1]])),
        torch.arange(60),
        cu,
        60,
        "inferencer",
    )
    of_base = torch.nn.functional.cross_entropy(codec.model.adapted.logits(hidden), tokens, reduction="sum") / 61
    assert float(loss - of_base) == pytest.approx(math.log(GAPS + 1), rel=0.02)


def test_bits_of_a_ztoken_are_those_of_its_slots_and_the_end():
    codec, tokens = tiny_codec(**SLOTS), torch.randint(3, 270, (60,))
    own, slots = make_batch([Section(tokens.tolist())], SEGMENT), codec.config.num_codebooks
    with torch.inference_mode():
        written, _ = close(codec.model, own.tokens, own.cu_segments, prunings=0)
        z = fill_slots(own.tokens, written, own.cu_segments, own.cu_sections, slots)
        loss, _ = inferencer_losses(codec.model, own, z, codec.model.embed(z), answers=False)
    held, rows = int(written.sum()), z.ztokens + 1
    assert evaluate_inferencer(codec, [tokens.tolist()]) == pytest.approx(
        {
            "bits_per_ztoken": float(loss) * (held + 1) / math.log(2) / rows,
            "uniform_bits": held * math.log2(codec.config.codebook_size * GAPS) / rows,
        }
    )


def test_what_an_exact_copy_takes():
    codec = tiny_codec(**SLOTS)
    found = evaluate_slots(codec, [torch.randint(3, 270, (64,)).tolist()])
    assert 0.9 < found["written"] <= 1 and found["ratio"] == pytest.approx(2, rel=0.1)
    assert found["base_bits"] > found["guessed_bits"] >= 0


def test_the_parts_run_and_resume(tmp_path):
    settings = tiny_settings(tmp_path, codec=CODEC, steps=4, checkpoint_every=2, eval_every=4)
    first = Trainer(settings, tiny_base())
    before = {n: p.detach().clone() for n, p in first.model.trainable_parameters().items()}
    folder = first.run()
    changed = {n for n, p in first.model.trainable_parameters().items() if not torch.equal(p, before[n])}
    others = (".inferencer.", ".compressor.", "zspace.", "draft.")
    assert changed and not any(other in n for n in changed for other in others)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert set(rows[-1]["eval"]) == {"written", "ratio", "guessed_bits", "base_bits"}

    for part, module in (("inferencer", "zspace."), ("compressor", "draft.")):
        values = {"part": part, "start": str(folder), "out": str(tmp_path / part), "codec": CODEC}
        run_again(tiny_settings(tmp_path, **values, steps=4, checkpoint_every=2, eval_every=4), first, part, module)


def run_again(settings, first, part: str, module: str):
    """Another part after the first, in two runs."""
    second = Trainer(settings, tiny_base())
    started = {n: p.detach().clone() for n, p in second.model.trainable_parameters().items()}
    rounded = first.model.slot_gates.detach().to(torch.bfloat16).float()
    assert torch.equal(second.model.slot_gates.detach(), rounded), "weights are those that were saved"
    for _ in range(2):
        second.train_step()
    second._save()
    resumed = Trainer(settings, tiny_base())
    assert resumed.step == 2
    resumed.run()
    changed = {n for n, p in resumed.model.trainable_parameters().items() if not torch.equal(p, started[n])}
    assert changed and all(n.startswith(module) or f".{part}." in n for n in changed)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"part": "quantiser"}, "part: expected one of"), ({"start": "nowhere"}, "start: nowhere: codec folder")],
)
def test_wrong_settings_are_refused(tmp_path, values, message):
    with pytest.raises(SettingsError, match=message):
        Trainer(tiny_settings(tmp_path, codec=CODEC, **values), tiny_base())
