"""Drafted and verified texts are those that steps write."""

import functools

import pytest
import torch

from tests.engine.models import random_model
from ztok_fast.engine import Engine, Texts, write_blocks, write_steps, write_told

V, D = 50, 32


@functools.cache
def engine(precision="int8"):
    return Engine.from_model(random_model("llama", 21, ("first",)), (None, "first"), precision, 6, 80, cache=False)


def inputs(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    count, longest = len(lengths), max(lengths, default=0)
    prompts = [torch.randint(0, V, (int(torch.randint(1, 20, (), generator=draw)),), generator=draw) for _ in lengths]
    return prompts, {
        "lengths": torch.tensor(lengths, dtype=torch.int64),
        "vectors": torch.randn(count, longest, D, generator=draw) * 0.5,
        "biases": torch.randn(count, longest, D, generator=draw),
    }


def by_hand(prompts, adapters, lengths, vectors=None, biases=None, forced=None):
    """One sequence after another with `prefill`, `step` and `argmax`."""
    own, texts = engine(), []
    for b, prompt in enumerate(prompts):
        alone, text = own.prefill([prompt], adapters[b]), []
        for column in range(int(lengths[b])):
            if column:
                own.step(alone, torch.tensor([text[-1]]), None if vectors is None else vectors[b, column][None])
            token = int(own.argmax(alone.hidden, None if biases is None else biases[b, column][None]))
            if forced is not None and forced[b, column] >= 0:
                token = int(forced[b, column])
            text.append(token)
        own.release(alone)
        texts.append(text)
    return texts


@pytest.mark.parametrize("without", [(), ("vectors",), ("biases",), ("vectors", "biases")], ids="-".join)
@pytest.mark.parametrize("forced", [False, True])
def test_steps_and_blocks_write_the_same(without, forced):
    lengths = [17, 1, 40, 0, 2]
    prompts, given = inputs(lengths)
    given = {name: value for name, value in given.items() if name not in without}
    if forced:
        draw = torch.Generator().manual_seed(1)
        given["forced"] = torch.where(torch.rand(5, 40, generator=draw) < 0.2, torch.randint(0, V, (5, 40)), -1)
    adapters = ["first", "base", "first", "base", "base"]
    sequences = engine().prefill(prompts, adapters)
    try:
        steps = write_steps(engine(), sequences, Texts(**given))
        texts = [row[:n].tolist() for row, n in zip(steps.tokens, lengths)]
        assert bool((steps.tokens[torch.arange(40) >= given["lengths"][:, None]] == -1).all())
        assert steps.passes.tolist() == [max(n - 1, 0) for n in lengths]
        engine().release(sequences)
        assert texts == by_hand(prompts, adapters, **given)
        sequences = engine().prefill(prompts, adapters)
        for block in (1, 2, 3, 16, 64):
            blocks = write_blocks(engine(), sequences, Texts(**given), block=block)
            assert torch.equal(blocks.tokens, steps.tokens)
            # A draft takes one pass and makes one token certain; so does each pass that confirms no guess.
            assert bool((blocks.passes <= steps.passes).all())
        told = write_told(engine(), sequences, Texts(**given))
        assert torch.equal(told.tokens, steps.tokens)
        assert sequences.lengths.tolist() == [len(prompt) for prompt in prompts]
    finally:
        engine().release(sequences)


@pytest.mark.parametrize("share", [0.0, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_there_is_a_pass_for_each_token_that_is_not_told(share, precision):
    lengths = [33, 20, 1, 0, 12]
    prompts, given = inputs(lengths, 2)
    draw = torch.Generator().manual_seed(1)
    told = torch.rand(5, 33, generator=draw) < share
    given["forced"] = torch.where(told, torch.randint(0, V, (5, 33), generator=draw), -1)
    own = engine(precision)
    sequences = own.prefill([*prompts[:3], [4], prompts[4]])
    found, steps = write_told(own, sequences, Texts(**given)), write_steps(own, sequences, Texts(**given))
    assert torch.equal(found.tokens, steps.tokens)
    guessed = (given["forced"] < 0) & (torch.arange(33) < given["lengths"][:, None])
    assert found.passes.tolist() == guessed[:, 1:].sum(1).tolist()  # the prompt predicts the first
    own.release(sequences)


def test_right_guesses_save_passes():
    lengths = [33, 20]
    prompts, given = inputs(lengths, 2)
    sequences = engine().prefill(prompts)
    truth = write_steps(engine(), sequences, Texts(**given)).tokens
    right = write_blocks(engine(), sequences, Texts(**given), block=16, draft=truth)
    assert torch.equal(right.tokens, truth) and right.passes.tolist() == [2, 2]
    wrong = truth.clone()
    wrong[0, 5] = (wrong[0, 5] + 1) % V
    one_wrong = write_blocks(engine(), sequences, Texts(**given), block=32, draft=wrong)
    assert torch.equal(one_wrong.tokens, truth) and one_wrong.passes.tolist()[1] == 1 < one_wrong.passes.tolist()[0]
    nonsense = write_blocks(engine(), sequences, Texts(**given), block=8, draft=torch.full_like(truth, -7))
    assert torch.equal(nonsense.tokens, truth)
    engine().release(sequences)


def test_a_text_that_does_not_depend_on_its_own_tokens_takes_few_passes():
    """Strong biases fix every token: the draft is right, and one pass per block confirms it."""
    draw = torch.Generator().manual_seed(4)
    prompts = [[1, 2, 3]]
    sequences = engine().prefill(prompts)
    biases = torch.randn(1, 32, D, generator=draw) * 1000
    written = write_blocks(engine(), sequences, Texts(torch.tensor([32]), biases=biases), block=31)
    assert written.passes.tolist() == [2]
    assert torch.equal(
        written.tokens, write_steps(engine(), sequences, Texts(torch.tensor([32]), biases=biases)).tokens
    )
    engine().release(sequences)


def test_float32_too():
    prompts, given = inputs([24, 24, 9], 5)
    own = engine("float32")
    sequences = own.prefill(prompts)
    assert torch.equal(
        write_blocks(own, sequences, Texts(**given)).tokens, write_steps(own, sequences, Texts(**given)).tokens
    )


@pytest.mark.parametrize("way", [write_steps, write_blocks, write_told])
def test_nothing_to_write(way):
    sequences = engine().prefill([[1], [2]])
    found = way(engine(), sequences, Texts(torch.tensor([0, 0])))
    assert found.tokens.shape == (2, 0) and found.passes.tolist() == [0, 0]
    engine().release(sequences)
    nobody = engine().prefill([])
    assert way(engine(), nobody, Texts(torch.empty(0).long())).tokens.shape == (0, 0)


@pytest.mark.parametrize("way", [write_steps, write_blocks, write_told])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([4])}, "lengths: expected a tensor int64 \\[2\\]"),
        ({"lengths": torch.tensor([4, -1])}, "lengths: expected at least 0, got -1"),
        ({"lengths": torch.tensor([4, 82])}, "texts that fit 80 rows, the capacity, got one that needs 82"),
        ({"vectors": torch.zeros(2, 3, D)}, "vectors: expected a tensor float32 \\[2, 4, 32\\]"),
        ({"biases": torch.zeros(2, 4, D).double()}, "biases: expected .* got float64"),
        ({"forced": torch.zeros(2, 5).long()}, "forced: expected a tensor int64 \\[2, 4\\]"),
    ],
)
def test_arguments_that_do_not_fit(way, change, message):
    sequences = engine().prefill([[1], [2]])
    with pytest.raises(ValueError, match=message):
        way(engine(), sequences, Texts(**({"lengths": torch.tensor([4, 2])} | change)))
    engine().release(sequences)


def test_options_of_blocks_that_do_not_fit():
    sequences = engine().prefill([[1], [2]])
    for change, message in (
        ({"block": 0}, "block: expected an integer of at least 1, got 0"),
        ({"block": True}, "block: expected an integer of at least 1, got True"),
        ({"draft": torch.zeros(2, 3).long()}, "draft: expected a tensor int64 \\[2, 4\\]"),
    ):
        with pytest.raises(ValueError, match=message):
            write_blocks(engine(), sequences, Texts(torch.tensor([4, 2])), **change)
    engine().release(sequences)
