"""Continuous batching: each prompt's tokens are those that it gets alone."""

import functools

import numpy as np
import pytest
import torch

from tests.engine import oracle
from tests.engine.models import oracle_of, random_model
from ztok_fast.engine import Engine

V = 50


@functools.cache
def model():
    return random_model("qwen2", 11, ("first", "second"))


@functools.cache
def engine(slots=3, precision="int8"):
    return Engine.from_model(model(), (None, "first", "second"), precision, slots, 96, cache=False)


def prompts(count=9):
    draw = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 30, (count,), generator=draw).tolist()
    return [torch.randint(0, V, (n,), generator=draw).tolist() for n in lengths]


def by_oracle(precision, adapter, prompt, count, ends=(), temperature=0.0, top_p=1.0, seed=0, row=0):
    ours, rows = oracle_of(model(), precision, adapter), list(prompt)
    for step in range(count):
        logits = ours.logits(ours.forward(rows)[-1:])[0]
        token = int(logits.argmax()) if not temperature else oracle.sample(logits, temperature, top_p, seed, row, step)
        if token in ends:
            break
        rows.append(token)
    return rows[len(prompt) :]


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_the_tokens_are_the_oracles(precision):
    some, names = prompts(3), ["second", "base", "first"]
    greedy = engine(precision=precision).generate(some, 6, names, end_tokens=())
    drawn = engine(precision=precision).generate(some, 6, names, 1.2, 0.8, 5, (), [4, 0, 9])
    for b, prompt in enumerate(some):
        adapter = None if names[b] == "base" else names[b]
        assert greedy[b] == by_oracle(precision, adapter, prompt, 6)
        assert drawn[b] == by_oracle(precision, adapter, prompt, 6, (), 1.2, 0.8, 5, [4, 0, 9][b])


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_slots_and_neighbours_change_no_token(temperature, slots):
    some = prompts()
    limits = [5, 1, 30, 0, 12, 7, 2, 30, 9]
    names = ["first", "base", "second"] * 3
    settings = {"temperature": temperature, "top_p": 0.95, "seed": 3, "end_tokens": (7, 11)}
    together = engine(slots).generate(some, limits, names, **settings)
    for b, prompt in enumerate(some):
        (alone,) = engine().generate([prompt], limits[b], names[b], row_ids=[b], **settings)
        assert together[b] == alone and len(alone) <= limits[b] and not {7, 11} & set(alone)
    assert engine(slots).slots.free == slots
    if temperature:
        assert len({tuple(row) for row in together}) > 5  # they are not all the same text


def test_a_text_ends_before_its_end_token():
    some = prompts(4)
    whole = engine().generate(some, 20, "first", end_tokens=())
    assert all(len(text) == 20 for text in whole)
    for text, prompt in zip(whole, some):
        end = text[6]
        (short,) = engine().generate([prompt], 20, "first", end_tokens=end)
        assert short == text[: text.index(end)]
    ends = {text[3] for text in whole}
    cut = [text[: min((i for i, token in enumerate(text) if token in ends), default=20)] for text in whole]
    assert engine().generate(some, 20, "first", end_tokens=sorted(ends)) == cut


def test_the_models_own_end_tokens_are_the_default():
    assert engine().settings.end_tokens == (2,)
    some = prompts(6)
    found = engine().generate(some, 40, temperature=3.0, seed=1)
    assert found == engine().generate(some, 40, temperature=3.0, seed=1, end_tokens=[2])
    assert any(len(text) < 40 for text in found)


def test_draws_depend_on_seed_and_row_id():
    prompt = [[1, 2, 3]] * 4
    settings = {"temperature": 2.0, "end_tokens": ()}
    drawn = engine().generate(prompt, 12, **settings)
    assert len({tuple(text) for text in drawn}) == 4
    assert engine().generate(prompt, 12, seed=1, **settings) != drawn
    assert engine().generate(prompt, 12, row_ids=[3, 3, 0, 1], **settings) == [drawn[3], drawn[3], drawn[0], drawn[1]]


def test_close_to_transformers():
    """In float32 the arg-max of a random model leads by more than rounding, nearly always."""
    bare, some = random_model("llama", 12), prompts(5)
    ours = Engine.from_model(bare, precision="float32", cache=False).generate(some, 10, end_tokens=())
    agreed = 0
    for prompt, text in zip(some, ours):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            theirs = bare.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, **settings)
        agreed += theirs[0, len(prompt) :].tolist() == text
    assert agreed >= 4


def test_nothing_to_do():
    assert engine().generate([], 5) == [] and engine().generate([[1], [2]], 0) == [[], []]
    assert engine().generate([], 5, row_ids=[]) == []


def test_slots_that_somebody_holds_are_left_alone():
    held = engine().prefill([[1, 2, 3], [4]])
    before = held.hidden.clone()
    some = prompts(5)
    assert engine().generate(some, 6) == engine(16).generate(some, 6)
    engine().step(held, torch.tensor([5, 6]))
    expected = oracle_of(model()).forward([1, 2, 3, 5])
    assert np.array_equal(held.hidden[0].numpy(), expected[-1]) and np.array_equal(before[0].numpy(), expected[-2])
    full = engine().prefill([[1]])
    with pytest.raises(ValueError, match="slots: expected a free one"):
        engine().generate([[1]], 3)
    engine().release(full)
    engine().release(held)


def test_slots_are_released_after_an_error(monkeypatch):
    own = engine(16)

    def fails(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(own, "argmax", fails)
    with pytest.raises(KeyboardInterrupt):
        own.generate(prompts(3), 5)
    assert own.slots.free == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[]]}, "prompts\\[0\\]: expected at least one token"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected an integer of at least 0, got -1"),
        ({"max_new_tokens": True}, "max_new_tokens: expected an integer of at least 0, got True"),
        ({"max_new_tokens": [3]}, "max_new_tokens: expected one number, or 2 of them, got 1"),
        ({"max_new_tokens": [3, 1.5]}, "max_new_tokens\\[1\\]: expected an integer"),
        ({"max_new_tokens": 96}, "expected a capacity of at least 97 rows for 2 tokens and 96 new ones, got 96"),
        ({"adapter": "other"}, "adapter: expected one of"),
        ({"adapter": ["first"]}, "adapter: expected one name, or 2 of them, got 1"),
        ({"temperature": -0.1}, "temperature: expected a finite number at least 0, got -0.1"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, got 0.0"),
        ({"seed": "x"}, "seed: expected an integer of 64 bits, got 'x'"),
        ({"end_tokens": [True]}, "end_tokens: expected an integer of at least 0, got True"),
        ({"end_tokens": -1}, "end_tokens: expected an integer of at least 0, got -1"),
        ({"row_ids": [1]}, "row_ids: expected a tensor int64 \\[2\\]"),
        ({"row_ids": [1.0, 2.0]}, "row_ids: expected a tensor int64 \\[2\\] on cpu, got float32"),
        ({"row_ids": "ab"}, "row_ids: expected 2 integers, got 'ab'"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        engine().generate(**({"prompts": [[1], [2, 3]], "max_new_tokens": 4} | change))
    assert engine().slots.free == 3


def test_a_text_may_fill_its_slot():
    """The last token is written and not read, so it needs no row."""
    (text,) = engine().generate([[1, 2]], 95, end_tokens=())
    assert len(text) == 95


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_without_finite_logits_is_named(temperature):
    model = random_model("llama", 3, tie_word_embeddings=False)
    model.model.embed_tokens.weight[5] = torch.nan
    own = Engine.from_model(model, slots=2, capacity=32, cache=False)
    with pytest.raises(ValueError, match="prompts\\[2\\]: expected finite logits, got NaN or infinity from the model"):
        own.generate([[1], [2], [5, 1]], [4, 2, 3], temperature=temperature, end_tokens=())
    assert own.slots.free == 2
