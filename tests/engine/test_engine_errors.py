"""What the engine refuses, and how it says so."""

import functools

import pytest
import torch

from tests.engine.models import random_model
from ztok_fast.engine import Engine, EngineUnsupported

V, D = 50, 32


@functools.cache
def refusing():
    """An engine with two adapters that no test changes."""
    return Engine.from_model(
        random_model("qwen3", 7, ("first", "second")), (None, "first", "second"), slots=8, capacity=128, cache=False
    )


ROW = {
    "tokens": torch.tensor([1]),
    "positions": torch.tensor([0]),
    "cu_rows": torch.tensor([0, 1]).int(),
    "slots": torch.tensor([0]).int(),
    "starts": torch.tensor([0]).int(),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.tensor([1, 2])}, "tokens: expected a tensor int64 \\[1\\] on cpu, got int64 \\[2\\]"),
        ({"tokens": torch.tensor([1.0])}, "tokens: expected .* got float32"),
        ({"tokens": torch.tensor([True])}, "tokens: expected .* got bool"),
        ({"positions": torch.tensor([[0]])}, "positions: expected .* got int64 \\[1, 1\\]"),
        ({"positions": [0]}, "positions: expected .* got list"),
        ({"cu_rows": torch.tensor([0, 1])}, "cu_rows: expected a tensor int32 \\[2\\]"),
        ({"vectors": torch.zeros(1, D + 1)}, f"vectors: expected a tensor float32 \\[1, {D}\\]"),
        ({"layers": True}, "layers: expected an integer of at least 1, got True"),
        ({"layers": 0}, "layers: expected an integer of at least 1, got 0"),
        ({"adapters": torch.tensor([0, 0]).int()}, "adapters: expected a tensor int32 \\[1\\]"),
    ],
)
def test_arguments_of_a_pass_that_do_not_fit(change, message):
    engine = refusing()
    with pytest.raises(ValueError, match=message):
        engine.forward(**(ROW | change))


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": torch.tensor([V])},
        {"tokens": torch.tensor([-2])},
        {"positions": torch.tensor([-1])},
        {"positions": torch.tensor([2**24])},
        {"cu_rows": torch.tensor([0, 2]).int()},
        {"slots": torch.tensor([8]).int()},
        {"slots": torch.tensor([-1]).int()},
        {"starts": torch.tensor([128]).int()},
        {"starts": torch.tensor([-1]).int()},
        {"adapters": torch.tensor([3]).int()},
        {"layers": 3},
    ],
    ids=lambda change: next(f"{name}={value}" for name, value in change.items()),
)
def test_values_out_of_range_in_a_pass(change):
    """C++ looks at values; the message names what is wrong."""
    engine = refusing()
    with pytest.raises(RuntimeError, match="engine_forward.*expected"):
        engine.forward(**(ROW | change))


def test_a_slot_twice_in_a_pass():
    engine = refusing()
    two = {name: torch.cat([value, value]) for name, value in ROW.items()} | {"cu_rows": torch.tensor([0, 1, 2]).int()}
    with pytest.raises(RuntimeError, match="slots"):
        engine.forward(**two)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "prompts\\[0\\]: expected at least one token"),
        ([[1], [2, V]], f"prompts\\[1\\]: expected tokens from 0 to {V - 1}, got {V}"),
        ([[-1]], "got -1"),
        ([[2**70]], "got larger ones"),
        ([[True]], "expected token ids, got bool True"),
        ([[1.0]], "expected token ids, got float"),
        (["text"], "expected a sequence of token ids, got str"),
        ("text", "prompts: expected a list of token sequences, got str"),
        (torch.tensor([1, 2]), "expected a list of token sequences, got Tensor"),
        ([torch.tensor([[1]])], "expected int64 \\[n\\] on cpu, got int64 \\[1, 1\\]"),
        ([torch.tensor([1.5])], "got float32"),
        ([[1]] * 9, "at most 8 sequences, the free ones of 8 slots, got 9"),
        ([[1] * 129], "expected at most 128 tokens, the capacity, got 129"),
    ],
)
def test_prompts_that_cannot_be_read(prompts, message):
    engine = refusing()
    with pytest.raises(ValueError, match=message):
        engine.prefill(prompts)
    assert engine.slots.free == 8


def test_other_misuse():
    engine = refusing()

    def refuses(message, call, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            call(*args, **kwargs)
        assert engine.slots.free == 8

    refuses("adapter: expected one of \\['base', 'first', 'second'\\], got 'third'", engine.prefill, [[1]], "third")
    refuses("adapter: expected one name, or 1 of them, got 2", engine.prefill, [[1]], ["first", "second"])
    refuses("vectors: expected", engine.prefill, [[1]], vectors=torch.zeros(2, D))
    refuses("positions: expected", engine.prefill, [[1]], positions=torch.tensor([1, 2]))
    refuses("release: expected slots that are taken, got \\[3\\]", engine.slots.release, torch.tensor([3]))
    refuses("slots: expected an integer of at least 1, got 0", engine.reserve, 0)
    refuses("capacity: expected an integer of at least 1, got True", engine.reserve, capacity=True)
    refuses("hidden: expected a tensor float32 \\[any, 32\\]", engine.logits, torch.zeros(D))
    refuses("bias: expected a tensor float32 \\[2, 32\\]", engine.argmax, torch.zeros(2, D), torch.zeros(D))
    ids = torch.tensor([0])
    for temperature, top_p, seed, message in (
        (0, 1, 0, "temperature: expected a finite number above 0, got 0"),
        (float("nan"), 1, 0, "temperature"),
        (True, 1, 0, "temperature"),
        (1, 0, 0, "top_p: expected a number above 0 and at most 1, got 0"),
        (1, 1.1, 0, "top_p"),
        (1, 1, 2**63, "seed: expected an integer of 64 bits"),
        (1, 1, 0.5, "seed"),
    ):
        refuses(message, engine.sample, torch.zeros(1, D), temperature, top_p, seed, ids, ids)
    refuses("steps: expected a tensor int64 \\[1\\]", engine.sample, torch.zeros(1, D), 1, 1, 0, ids, ids.int())
    refuses("slots: expected a number of at least 0, got -1", engine.slots.acquire, -1)
    taken = engine.slots.acquire(2)
    with pytest.raises(ValueError, match="one of them twice"):
        engine.slots.release(taken[[0, 0]])
    engine.slots.release(taken)
    with pytest.raises(ValueError, match="not taken"):
        engine.slots.release(taken)


def test_a_full_slot():
    engine = Engine.from_model(random_model(), slots=1, capacity=16, cache=False)
    sequences = engine.prefill([range(16)])
    with pytest.raises(RuntimeError, match="engine_forward.*expected"):
        engine.step(sequences, torch.tensor([1]))
    assert sequences.lengths.tolist() == [16]


def test_the_capacity_ends_at_the_sliding_window():
    model = random_model("mistral", sliding_window=48)
    engine = Engine.from_model(model, capacity=48, slots=1, cache=False)
    with pytest.raises(ValueError, match="at most the sliding window of 48, got 49"):
        engine.reserve(capacity=49)


def test_adapters_by_default():
    model = random_model(adapters=("first", "second"))
    assert Engine.from_model(model, "second", cache=False).variant(None) == 0
    assert Engine.from_model(model, ("second", None), cache=False).variant(None) == 1
    with pytest.raises(ValueError, match="expected one of \\['first', 'second'\\], got None"):
        Engine.from_model(model, ("first", "second"), cache=False).variant(None)


def test_a_processor_without_fma(machine, monkeypatch):
    machine(0, 1)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(EngineUnsupported, match="processor: expected AVX2 and FMA"):
        Engine.from_model(random_model(), cache=False)


def test_without_the_compiled_library(monkeypatch):
    from ztok_fast import native

    absent = native.PartStatus("cpu", False, "not built: why", native.LIBRARY_DIR)
    monkeypatch.setattr(native, "status", lambda name: absent)
    with pytest.raises(EngineUnsupported, match="compiled library for the CPU, got none: not built: why"):
        Engine.from_model(random_model(), cache=False)
