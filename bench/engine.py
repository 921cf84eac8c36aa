"""Passes of the engine: prefill, and a step with its arg-max, for random models of the sizes that ship.

The registry imports this module where transformers may be absent: what needs it is imported when a case is made.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.subject import Subject
from ztok_fast.ops.spec import Case, Mismatch, Work

SIZES = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50},
    "ztok-mini": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8,
                  "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 2048},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152},
}  # fmt: skip
PARTS = 2
"""The check runs the sequences, or the rows of the only one, in so many passes."""


@functools.lru_cache(maxsize=1)
def packed(name: str):
    """Packed weights and settings of a random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ztok_fast.engine.architecture import read
    from ztok_fast.engine.weights import pack

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES[name], tie_word_embeddings=True, eos_token_id=None)).eval()
    found = read(model)
    return pack(found, cache=False), found.settings


@dataclass(frozen=True)
class EnginePass(Subject):
    """`sequences` sequences that read `rows` rows each after `context` rows that they hold."""

    whole = True

    def needs(self, case):
        missing = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
        return f"{missing[0]} is not installed" if missing else None

    def make(self, case, generator):
        from ztok_fast.engine import Engine

        weights, settings = packed(case["model"])
        count, rows, context = (case[name] for name in ("sequences", "rows", "context"))
        draw = torch.Generator().manual_seed(generator.initial_seed())  # the same tokens on every device
        tokens = torch.randint(0, settings.vocabulary, (count, rows), generator=draw)
        engines = [Engine(weights, settings, count, context + rows, device) for device in (generator.device, "cpu")]
        if context:
            prompt = torch.randint(0, settings.vocabulary, (1, context), generator=draw)
            for engine in engines:
                read_rows(engine, prompt, 0, slice(0, 1))
                engine.keys[:, 1:] = engine.keys[:, :1]
                engine.values[:, 1:] = engine.values[:, :1]
        return {"engine": engines[0], "cpu": engines[1], "tokens": tokens}

    def run(self, case, inputs):
        hidden = read_rows(inputs["engine"], inputs["tokens"], case["context"], slice(0, case["sequences"]))
        return hidden, (inputs["engine"].argmax(hidden) if case["rows"] == 1 else None)

    def check(self, case, inputs, found):
        """The bits of the CPU's engine, which reads the same in `PARTS` passes."""
        count, rows, context = (case[name] for name in ("sequences", "rows", "context"))
        parts = []
        for i in range(PARTS):
            if count == 1:
                part = slice(i * rows // PARTS, (i + 1) * rows // PARTS)
                own, first, some = inputs["tokens"][:, part], context + part.start, slice(0, 1)
            else:
                some = slice(i * count // PARTS, (i + 1) * count // PARTS)
                own, first = inputs["tokens"][some], context
            if own.numel():
                parts.append(read_rows(inputs["cpu"], own, first, some))
        expected, (hidden, tokens) = torch.cat(parts), found
        wrong = int((hidden.cpu().view(torch.int32) != expected.view(torch.int32)).any(-1).sum())
        if wrong:
            raise Mismatch(f"hidden states: {wrong} of {len(expected)} rows have other bits than the CPU's")
        if tokens is not None and not torch.equal(tokens.cpu(), inputs["cpu"].argmax(expected)):
            raise Mismatch("tokens: not those of the CPU")

    def work(self, case, inputs):
        s = inputs["engine"].settings
        width, kv = s.heads * s.head_width, s.kv_heads * s.head_width
        weights = s.layers * (s.hidden * (2 * width + 2 * kv) + 3 * s.hidden * s.intermediate)
        rows, seen = case["sequences"] * case["rows"], case["context"] + case["rows"]
        head = s.vocabulary * s.hidden if case["rows"] == 1 else 0
        attention = 4.0 * rows * (case["context"] + (case["rows"] + 1) / 2) * width * s.layers
        cache = case["sequences"] * seen * 2 * kv * 2.0 * s.layers
        return Work(2.0 * rows * (weights + head) + attention, weights + head + cache + 4.0 * rows * s.hidden)


def read_rows(engine, tokens: Tensor, start: int, slots: slice) -> Tensor:
    """Hidden states of rows `tokens` [n, rows] of the sequences in `slots`, after `start` rows in the cache."""
    count, rows = tokens.shape
    return engine.forward(
        tokens.reshape(-1),
        (start + torch.arange(rows)).repeat(count),
        torch.arange(0, count * rows + 1, rows, dtype=torch.int32),
        torch.arange(slots.start, slots.stop, dtype=torch.int32),
        torch.full((count,), start, dtype=torch.int32),
    )


def _cases(*sizes: tuple[int, int, int]) -> tuple[Case, ...]:
    """(sequences, rows, context) for each model."""
    names = ("sequences", "rows", "context")
    found = [Case({"model": "tiny", **dict(zip(names, (3, min(sizes[0][1], 5), 4)))}, set="tiny")]
    found += [Case({"model": model, **dict(zip(names, own))}) for model in ("ztok-mini", "smollm2") for own in sizes]
    return tuple(found)


@dataclass(frozen=True)
class Prefill(EnginePass):
    cases = _cases((1, 512, 0), (16, 64, 0))


@dataclass(frozen=True)
class Step(EnginePass):
    cases = _cases((1, 1, 256), (16, 1, 256), (128, 1, 256))


PREFILL, STEP = Prefill("engine_prefill", ()), Step("engine_step", ())
