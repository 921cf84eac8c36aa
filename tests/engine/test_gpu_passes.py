"""Passes of the engine by Triton kernels against those in C++, bit for bit: on a GPU, or interpreted without one."""

import pytest
import torch

from tests.engine.models import random_model
from ztok_fast.engine import Engine, EngineUnsupported

pytest.importorskip("triton")

from ztok_fast.engine import cuda  # noqa: E402
from ztok_fast.engine import triton as pieces  # noqa: E402
from ztok_fast.engine.sampling import draw, greatest  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 20}
MODELS = [
    ("llama", "int8", (), {"num_hidden_layers": 2}),
    ("qwen2", "int8", ("a", "b"), {}),
    ("qwen3", "int8", (), {"head_dim": 48}),
    ("mistral", "float32", ("a", "b"), {}),
]


def engines(family, precision, adapters, settings, slots=3, capacity=48):
    """The same model on the CPU and on the device of the test, where Triton interprets kernels without a GPU."""
    model = random_model(family, adapters=adapters, **(SMALL | settings))
    variants = (*adapters, None)
    first = Engine.from_model(model, variants, precision, slots, capacity, cache=False)
    if DEVICE == "cuda":
        return first, Engine.from_model(model.to(DEVICE), variants, precision, slots, capacity, cache=False)
    second = Engine(first.weights, first.settings, slots, capacity)
    second._passes = cuda.CudaPasses(first.weights, first.settings, second.device)
    return first, second


def to(engine, value):
    return None if value is None else value.to(engine.device)


def same_bits(first, second):
    assert first.dtype == second.dtype and first.shape == second.shape
    view = torch.int32 if first.dtype == torch.float32 else first.dtype
    assert torch.equal(first.view(view), second.cpu().view(view))


@pytest.mark.parametrize(("family", "precision", "adapters", "settings"), MODELS)
def test_prefill_and_steps_have_the_bits_of_the_cpu(family, precision, adapters, settings):
    """Three sequences under their own adapters: a prefill with vectors, two steps without and one with them."""
    both = engines(family, precision, adapters, settings)
    generator = torch.Generator().manual_seed(1)
    hidden = both[0].settings.hidden
    prompts = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]
    vectors = torch.randn(9, hidden, generator=generator)
    names = ([*adapters, None] * 3)[:3]
    sequences = [engine.prefill(prompts, names, to(engine, vectors)) for engine in both]
    same_bits(sequences[0].hidden, sequences[1].hidden)
    for step in range(3):
        tokens = torch.randint(-1, both[0].settings.vocabulary, (3,), generator=generator)
        vectors = torch.randn(3, hidden, generator=generator) if step == 2 else None
        same_bits(*(e.step(s, tokens, to(e, vectors)) for e, s in zip(both, sequences)))
    assert {count for count, _ in both[1]._passes._steps} == {4}  # steps were steps
    bias = torch.randn(3, hidden, generator=generator)
    states = sequences[0].hidden
    for added in (None, bias):
        same_bits(*(e.logits(to(e, states), to(e, added)) for e in both))
        same_bits(*(e.argmax(to(e, states), to(e, added)) for e in both))
    ids, at = torch.tensor([0, 2**40, -7]), torch.tensor([0, 1, 5])
    for temperature, top_p in ((1.0, 1.0), (0.3, 0.9), (2.5, 0.4)):
        same_bits(*(e.sample(to(e, states), temperature, top_p, 11, ids, at) for e in both))


def test_generate_and_larger_arenas():
    """Prompts wait for slots, sampled tokens; then more slots, so that steps are made anew."""
    both = engines("llama", "int8", (), {}, slots=2)
    prompts = [[3, 4, 5], [6], [7, 8]]
    for slots in (2, 3):
        texts = []
        for engine in both:
            engine.reserve(slots)
            texts.append(engine.generate(prompts, [3, 2, 4], temperature=1.0, seed=slots, end_tokens=()))
        assert texts[0] == texts[1]


def test_the_first_layers_and_rows_that_attend_in_turn(monkeypatch):
    monkeypatch.setattr(pieces, "SCORES_AT_ONCE", 100)
    both = engines("llama", "int8", (), {"num_hidden_layers": 2})
    tokens, positions = torch.arange(7), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    bounds, slots, starts = (torch.tensor(v, dtype=torch.int32) for v in ([0, 4, 7], [2, 0], [0, 0]))
    same_bits(*(engine.forward(tokens, positions, bounds, slots, starts, layers=1) for engine in both))
    one = torch.tensor([0, 1], dtype=torch.int32)
    again = tokens[:1], torch.tensor([4]), one, slots[:1], torch.tensor([2], dtype=torch.int32)
    both[1].forward(*again, layers=1)
    assert not both[1]._passes._steps  # only passes through all layers are steps


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": torch.tensor([1, 20])}, "tokens: expected from -1 to 19, got 20"),
        ({"positions": torch.tensor([-1, 1])}, "positions: expected from 0 to 16777215, got -1"),
        ({"slots": torch.tensor([3], dtype=torch.int32)}, "slots: expected from 0 to 2, got 3"),
        ({"starts": torch.tensor([47], dtype=torch.int32)}, "starts . rows .*: expected from 0 to 48, got 49"),
        ({"starts": torch.tensor([-1], dtype=torch.int32)}, "starts: expected at least 0, got -1"),
        ({"adapters": torch.tensor([1], dtype=torch.int32)}, "adapters: expected from 0 to 0, got 1"),
        ({"cu_rows": torch.tensor([0, 3], dtype=torch.int32)}, "cu_rows: expected rising from 0 to the 2 rows"),
        ({"layers": 2}, "layers: expected from 1 to 1, got 2"),
    ],
)
def test_values_out_of_range_are_refused(changed, message):
    _, engine = engines("llama", "int8", (), {})
    arguments = {"tokens": torch.tensor([1, 2]), "positions": torch.tensor([0, 1])}
    for name, value in (("cu_rows", [0, 2]), ("slots", [1]), ("starts", [0])):
        arguments[name] = torch.tensor(value, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"engine: {message}"):
        engine.forward(**(arguments | changed))


def test_the_same_slot_twice_is_refused():
    _, engine = engines("llama", "int8", (), {})
    bounds, slots, starts = (torch.tensor(v, dtype=torch.int32) for v in ([0, 1, 2], [1, 1], [0, 0]))
    with pytest.raises(ValueError, match=r"engine: slots: expected each once, got \[1, 1\]"):
        engine.forward(torch.tensor([1, 2]), torch.tensor([0, 0]), bounds, slots, starts)


def test_no_rows_and_no_sequences():
    both = engines("llama", "int8", (), {})
    none, empty = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
    for engine in both:
        hidden = engine.forward(empty, empty, torch.zeros(1, dtype=torch.int32), none, none)
        assert hidden.shape == (0, 16) and engine.logits(hidden).shape == (0, 20)
        assert engine.sample(hidden, 1.0, 1.0, 0, empty, empty).shape == engine.argmax(hidden).shape == (0,)


def test_rows_without_a_token():
    """Logits that are -inf in part are drawn from; rows with NaN or infinity are refused, on both devices."""
    logits = torch.zeros(4, 5, device=DEVICE)
    logits[1, 3], logits[2, 0], logits[3, 1:] = torch.nan, torch.inf, -torch.inf
    ids = torch.zeros(4).long()
    assert greatest(logits).tolist() == [0, -1, -1, 0]
    drawn = draw(logits, 1.0, 1.0, 0, ids, ids).tolist()
    assert drawn[0] >= 0 and drawn[1:] == [-1, -1, 0]
    assert draw(logits.clamp(max=1e30) * 0 + 1e30, 1e-20, 1.0, 0, ids, ids).tolist()[0] == -1
    for engine in engines("llama", "int8", (), {}):
        states = to(engine, torch.zeros(3, 16))
        states[1] = torch.inf
        with pytest.raises(ValueError, match="engine: row 1: expected finite logits, got NaN or infinity"):
            engine.argmax(states)
        with pytest.raises(ValueError, match="engine: row 1: expected finite logits, got NaN or infinity"):
            engine.sample(states, 1.0, 1.0, 0, ids[:3], ids[:3])


def test_a_device_that_the_engine_does_not_run_on_is_refused():
    first, _ = engines("llama", "int8", (), {})
    with pytest.raises(EngineUnsupported, match="device: expected the CPU or a CUDA device, got meta"):
        Engine(first.weights, first.settings, device="meta")
