"""The engine against the oracle, bit for bit, whatever the batch, the chunking, the threads and the instruction set."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine import oracle
from tests.engine.conftest import instruction_sets
from tests.engine.models import FAMILIES, oracle_of, random_model
from ztok_fast.engine import Engine

ADAPTERS = ("base", "first", "second")
V, D = 50, 32


def make(precision="int8", family="llama", seed=0, adapters=(), slots=4, capacity=64, **settings):
    """An engine whose arenas hold NaN wherever nothing was written, and its model."""
    model = random_model(family, seed, adapters, **settings)
    engine = Engine.from_model(model, (None, *adapters), precision, slots, capacity, cache=False)
    engine.keys.fill_(torch.nan)
    engine.values.fill_(torch.nan)
    return engine, model


def read_in_parts(engine, rows, schedule, slots):
    """Hidden states of sequences that are read in passes; `schedule[p][b]` rows of sequence b in pass p.

    `rows` is a list of (tokens, positions, vectors or None, adapter index).
    """
    starts, parts = [0] * len(rows), [[] for _ in rows]
    for counts in schedule:
        index = [b for b in range(len(rows)) if counts[b]]
        cut = {b: slice(starts[b], starts[b] + counts[b]) for b in index}
        hidden = engine.forward(
            torch.cat([rows[b][0][cut[b]] for b in index]),
            torch.cat([rows[b][1][cut[b]] for b in index]),
            torch.tensor([0, *np.cumsum([counts[b] for b in index])], dtype=torch.int32),
            torch.tensor([slots[b] for b in index], dtype=torch.int32),
            torch.tensor([starts[b] for b in index], dtype=torch.int32),
            torch.tensor([rows[b][3] for b in index], dtype=torch.int32),
            None if rows[0][2] is None else torch.cat([rows[b][2][cut[b]] for b in index]),
        )
        for b, part in zip(index, hidden.split([counts[b] for b in index])):
            parts[b].append(part)
            starts[b] += counts[b]
    return [torch.cat(part) for part in parts]


def random_rows(draw: torch.Generator, lengths, vocabulary, hidden, vectors, variants):
    rows = []
    for length in lengths:
        tokens = torch.randint(-1 if vectors else 0, vocabulary, (length,), generator=draw)
        positions = torch.randint(1, 40, (length,), generator=draw).cumsum(0) - 1
        added = torch.randn(length, hidden, generator=draw) if vectors else None
        rows.append((tokens, positions, added, int(torch.randint(variants, (), generator=draw))))
    return rows


def random_schedule(draw: torch.Generator, lengths, largest):
    """Passes of 0 to `largest` rows of each sequence, until all are read."""
    left, schedule = list(lengths), []
    while any(left):
        counts = [min(n, int(torch.randint(0, largest + 1, (), generator=draw))) for n in left]
        if any(counts):
            schedule.append(counts)
            left = [n - c for n, c in zip(left, counts)]
    return schedule


@st.composite
def models(draw):
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (5, 1), (6, 2)]))
    return draw(st.sampled_from(sorted(FAMILIES))), {
        "hidden_size": 16 * heads,
        "head_dim": draw(st.sampled_from([16, 32, 48])),
        "intermediate_size": draw(st.sampled_from([16, 48, 80])),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(3, 70)),
        "tie_word_embeddings": draw(st.booleans()),
    }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=models(),
    precision=st.sampled_from(["int8", "float32"]),
    lengths=st.lists(st.integers(1, 37), min_size=1, max_size=4),
    largest=st.sampled_from([1, 3, 20, 40]),
    vectors=st.booleans(),
    isa=st.sampled_from(instruction_sets()),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 10**6),
)
def test_a_row_has_the_oracles_bits(machine, model, precision, lengths, largest, vectors, isa, threads, seed):
    family, sizes = model
    if family == "qwen2":  # the width of its heads follows from the other sizes
        sizes = {name: size for name, size in sizes.items() if name != "head_dim"}
    machine(max(instruction_sets()), threads)
    engine, hf = make(precision, family, seed, ("first",), **sizes)
    machine(isa, threads)
    draw = torch.Generator().manual_seed(seed)
    rows = random_rows(draw, lengths, hf.config.vocab_size, hf.config.hidden_size, vectors, 2)
    slots = torch.randperm(4, generator=draw)[: len(rows)].tolist()
    got = read_in_parts(engine, rows, random_schedule(draw, lengths, largest), slots)
    biases = torch.randn(len(rows), hf.config.hidden_size, generator=draw) if vectors else None
    logits = engine.logits(torch.stack([g[-1] for g in got]), biases)
    best = engine.argmax(torch.stack([g[-1] for g in got]), biases)
    for b, (tokens, positions, added, variant) in enumerate(rows):
        ours = oracle_of(hf, precision, (None, "first")[variant])
        expected = ours.forward(tokens.numpy(), None if added is None else added.numpy(), positions.numpy())
        assert np.array_equal(got[b].numpy(), expected)
        of_last = ours.logits(expected[-1:], None if biases is None else biases[b : b + 1].numpy())[0]
        assert np.array_equal(logits[b].numpy(), of_last) and int(best[b]) == int(of_last.argmax())


@functools.cache
def shared(precision):
    """An engine with two adapters for tests that do not change it, its model and its oracles."""
    engine, model = make(precision, "qwen3", 7, ("first", "second"), slots=8, capacity=128)
    return engine, [oracle_of(model, precision, name if name != "base" else None) for name in ADAPTERS]


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_chunks_steps_and_neighbours_change_no_bit(precision, machine):
    """Long sequences, without the oracle: all ways of reading agree with reading each alone, whole."""
    engine, _ = shared(precision)
    draw = torch.Generator().manual_seed(3)
    lengths = [100, 1, 65, 16, 17, 3]
    rows = random_rows(draw, lengths, V, D, True, 3)
    alone = [read_in_parts(engine, [row], [[len(row[0])]], [5])[0] for row in rows]
    for largest in (1, 2, 7, 16, 33, 100):
        for isa in instruction_sets():
            machine(isa, 1 + largest % 3)
            got = read_in_parts(engine, rows, random_schedule(draw, lengths, largest), [3, 0, 7, 2, 1, 6])
            for one, other in zip(got, alone, strict=True):
                assert torch.equal(one, other), (largest, isa)


def test_the_first_layers_alone():
    engine, oracles = shared("int8")
    tokens = torch.arange(5)
    for layers in (1, 2):
        got = engine.forward(
            tokens,
            tokens,
            torch.tensor([0, 5]).int(),
            torch.tensor([0]).int(),
            torch.tensor([0]).int(),
            None,
            None,
            layers,
        )
        assert np.array_equal(got.numpy(), oracles[0].forward(tokens.numpy(), layers=layers))


def test_positions_that_are_large_or_fall():
    engine, oracles = shared("float32")
    positions = torch.tensor([2**24 - 1, 7, 0, 10**6, 123456, 2**20])
    one, cu_rows = torch.tensor([0]).int(), torch.tensor([0, 6]).int()
    got = engine.forward(torch.arange(6), positions, cu_rows, one, one)
    assert np.array_equal(got.numpy(), oracles[0].forward(np.arange(6), positions=positions.numpy()))


def test_rows_that_are_read_again_replace_the_old_ones():
    engine, oracles = shared("float32")
    slot, new = torch.tensor([1]).int(), torch.tensor([9, 8, 7])
    read = functools.partial(engine.forward, slots=slot)
    read(torch.arange(6), torch.arange(6), torch.tensor([0, 6]).int(), starts=torch.tensor([0]).int())
    got = read(new, torch.arange(3) + 2, torch.tensor([0, 3]).int(), starts=torch.tensor([2]).int())
    assert np.array_equal(got.numpy(), oracles[0].forward([0, 1, 9, 8, 7])[2:])


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_prefill_and_step(precision):
    engine, oracles = shared(precision)
    prompts = [[1, 2, 3], torch.tensor([4]), range(5, 25)]
    sequences = engine.prefill(prompts, ["second", "base", "first"])
    assert len(sequences) == 3 and engine.slots.free == 5
    written = [list(map(int, prompt)) for prompt in prompts]
    order = [2, 0, 1]
    for step in range(4):
        for b, row in enumerate(written):
            assert np.array_equal(sequences.hidden[b].numpy(), oracles[order[b]].forward(row)[-1])
            row.append((7 * b + step) % V)
        engine.step(sequences, torch.tensor([row[-1] for row in written]))
    assert sequences.lengths.tolist() == [7, 5, 24] == sequences.positions.tolist()
    hidden = sequences.hidden
    assert engine.keep(sequences, torch.tensor([True, False, True])) is sequences
    assert len(sequences) == 2 and engine.slots.free == 6 and torch.equal(sequences.hidden, hidden[[0, 2]])
    vectors = torch.randn(2, D)
    engine.step(sequences, torch.tensor([-1, 3]), vectors)
    added = torch.zeros(25, D)
    added[24] = vectors[1]
    assert np.array_equal(sequences.hidden[1].numpy(), oracles[1].forward([*written[2], 3], added.numpy())[-1])
    engine.release(sequences)
    assert engine.slots.free == 8 and len(sequences) == 0
    with pytest.raises(ValueError, match="tokens: expected a tensor int64 \\[0\\]"):
        engine.step(sequences, torch.tensor([1, 2]))  # their slots may be others' by now


def test_prefill_with_vectors_and_positions():
    engine, oracles = shared("int8")
    vectors, positions = torch.randn(5, D), torch.tensor([3, 4, 5, 0, 9])
    sequences = engine.prefill([[1, 2, 3], [4, 5]], "first", vectors, positions)
    for b, rows in enumerate((slice(0, 3), slice(3, 5))):
        expected = oracles[1].forward(np.arange(1, 6)[rows], vectors[rows].numpy(), positions[rows].numpy())[-1]
        assert np.array_equal(sequences.hidden[b].numpy(), expected)
    assert sequences.positions.tolist() == [6, 10] and sequences.lengths.tolist() == [3, 2]
    engine.release(sequences)


def test_larger_arenas_hold_what_the_smaller_held():
    engine, model = make(seed=3, slots=2, capacity=16)
    ours = oracle_of(model)
    sequences = engine.prefill([[1, 2, 3], [4, 5, 6, 7]])
    engine.reserve(slots=5, capacity=40)
    assert engine.slots.free == 3 and engine.capacity == 40 and engine.values.shape[3] == 48
    engine.reserve(1, 8)
    assert engine.capacity == 40 and engine.slots.count == 5
    for token in range(20):
        engine.step(sequences, torch.tensor([token, token]))
    for b, prompt in enumerate(([1, 2, 3], [4, 5, 6, 7])):
        assert np.array_equal(sequences.hidden[b].numpy(), ours.forward([*prompt, *range(20)])[-1])


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_samples_are_the_oracles(precision, machine):
    engine, oracles = shared(precision)
    draw = torch.Generator().manual_seed(5)
    hidden, bias = torch.randn(12, D, generator=draw), torch.randn(12, D, generator=draw)
    ids = torch.tensor([0, 1, 5, 2**40, -1, 7, 7, 7, 3, 2, 11, 12])
    steps = torch.tensor([0, 1, 5, 9, 2, 0, 1, 2, 3, 2**31, 1, 0])
    logits = oracles[0].logits(hidden.numpy(), bias.numpy())
    for isa in instruction_sets():
        machine(isa, 2)
        for temperature, top_p, seed in (
            (1.0, 1.0, 0),
            (0.7, 0.9, -1),
            (3.5, 0.3, 2**63 - 1),
            (0.01, 1.0, 5),
            (1, 1e-9, 1),
        ):
            got = engine.sample(hidden, temperature, top_p, seed, ids, steps, bias)
            rows = zip(logits, ids.tolist(), steps.tolist())
            assert got.tolist() == [oracle.sample(row, temperature, top_p, seed, i, s) for row, i, s in rows]
    some = [7, 2, 9]
    alone = engine.sample(hidden[some], 0.7, 0.9, -1, ids[some], steps[some], bias[some])
    assert alone.tolist() == engine.sample(hidden, 0.7, 0.9, -1, ids, steps, bias)[some].tolist()


def test_ties_go_to_the_lowest_token():
    model = random_model(seed=6, tie_word_embeddings=False)
    model.lm_head.weight[30] = model.lm_head.weight[10]
    engine = Engine.from_model(model, cache=False)
    hidden = model.lm_head.weight[30:31].float().contiguous() * 50
    logits = engine.logits(hidden)[0]
    assert logits[10] == logits[30] == logits.max() and int(engine.argmax(hidden)) == 10


def test_a_logit_of_minus_infinity_is_never_chosen():
    model = random_model(seed=6, tie_word_embeddings=False)
    model.lm_head.weight[:40] = -3e38
    engine = Engine.from_model(model, precision="float32", cache=False)
    hidden, ids = torch.full((64, D), 10.0), torch.arange(64)
    assert bool((engine.logits(hidden)[:, :40] == -torch.inf).all())
    drawn = engine.sample(hidden, 50.0, 1.0, 0, ids, ids)
    assert int(engine.argmax(hidden).min()) >= 40 and int(drawn.min()) >= 40 and len(drawn.unique()) > 1


def test_what_is_not_finite_stays_in_its_row():
    engine, oracles = shared("int8")
    tokens = torch.tensor([1, 2, 3, 4])
    vectors = torch.zeros(4, D)
    vectors[1, 3] = torch.inf
    cu_rows, slots = torch.tensor([0, 2, 4]).int(), torch.tensor([0, 1]).int()
    hidden = engine.forward(tokens, torch.tensor([0, 1, 0, 1]), cu_rows, slots, torch.zeros(2).int(), None, vectors)
    assert hidden[1].isnan().all()
    assert np.array_equal(hidden[0].numpy(), oracles[0].forward([1])[0])
    assert np.array_equal(hidden[2:].numpy(), oracles[0].forward([3, 4]))
    assert engine.logits(hidden)[1].isnan().all()


def test_close_to_transformers():
    model = random_model("mistral", seed=8)
    engine = Engine.from_model(model, precision="float32", cache=False)
    tokens = torch.arange(20)
    sequences = engine.prefill([tokens])
    with torch.no_grad():
        expected = model(tokens[None]).logits[0, -1]
    torch.testing.assert_close(engine.logits(sequences.hidden)[0], expected, rtol=1e-3, atol=1e-4)
