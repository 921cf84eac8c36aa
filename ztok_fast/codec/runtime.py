"""What runs the base model in a codec: transformers' modules, or the engine.

`FloatRuntime` runs anything anywhere and is what training differentiates. `EngineRuntime` runs supported models on
CPUs, faster, and with the same bits for a row whatever else runs (docs/determinism.md). Both have the same methods.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ztok_fast.codec.adapters import ADAPTERS, AdaptedBase
from ztok_fast.codec.float_session import DecodeSession
from ztok_fast.codec.layout import offsets
from ztok_fast.engine import Engine, Sequences, Texts, write_blocks, write_told
from ztok_fast.engine.draft import DRAFTED_SEQUENCES, TOLD_SHARE, Choose
from ztok_fast.engine.sampling import check_tokens, draw, greatest
from ztok_fast.ops import ordered_linear, ordered_pack
from ztok_fast.profiling import HEAD, MODEL, count_rows, measuring, stage

PASS_SEQUENCES = 32
"""Sequences of one pass of the engine that nobody continues: they share a few slots of its cache."""


WORD_TABLE = 1 << 23
"""Most elements of a table of what a linear layer makes of every word: 32 MB. It is made once."""


class Session(Protocol):
    """Sequences that are continued row by row."""

    last: Tensor
    """Hidden states ``[B, D]`` of every sequence's last row."""

    def draft(self, lengths: Tensor, conditioning, logit_bias, forced, choose: Choose | None = None) -> Tensor | None:
        """What `decode_text` writes, if the session has a faster way than steps, else ``None``."""

    def step(self, embeds: Tensor, position_ids: Tensor) -> Tensor:
        """Append one row ``[b, D]`` to the first b sequences, at ``position_ids [b]``; their hidden states ``[b, D]``.

        b is at most that of the step before; the other sequences have ended.
        """


class FloatRuntime:
    """The base model as transformers runs it."""

    name, exact = "float", False

    def __init__(self, adapted: AdaptedBase) -> None:
        self.adapted = adapted

    def hidden(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_length: int,
        adapter: str | None,
        layers: int | None = None,
    ) -> Tensor:
        """Last hidden states ``[T, D]`` of packed sequences.

        Args:
            embeds: ``[T, D]``; position_ids int64 ``[T]``; cu_seqlens int32 ``[B + 1]``, max_length the longest.
            adapter: its name, ``None`` for the bare base; layers: run the first so many.
        """
        with stage(MODEL, len(embeds), layers):
            return self.adapted(embeds, position_ids, cu_seqlens, max_length, adapter=adapter, layers=layers)

    @contextmanager
    def session(
        self,
        adapter: str | None,
        embeds: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        new_rows: int,
        layers: int | None = None,
    ) -> Iterator[Session]:
        """Read packed prefixes, each of at least one row, to be continued by at most ``new_rows`` rows."""
        yield DecodeSession(self.adapted, adapter, embeds, position_ids, cu_seqlens, new_rows, layers)

    def logits(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """Vocabulary logits ``[..., V]``; ``bias`` is added to the hidden states ``[..., D]``."""
        with stage(HEAD, hidden.shape[:-1].numel()):
            return self.adapted.logits(hidden if bias is None else hidden + bias)

    def argmax(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """The likeliest tokens, int64 ``[B]``, of hidden states ``[B, D]``."""
        return self.logits(hidden, bias).argmax(-1)

    def choose(self, logits: Tensor, temperature: float, top_p: float, seed: int, row_ids: Tensor, step: int) -> Tensor:
        """One choice for each row of float32 logits ``[B, n]``, int64 ``[B]``; the arguments are those of `z_select`.

        Raises:
            ValueError: a row has no choice, because a logit is NaN or the greatest is not finite.
        """
        if temperature == 0:
            return check_tokens(greatest(logits)).to(logits.device)
        steps = torch.full((len(logits),), step)
        return check_tokens(draw(logits, temperature, top_p, seed, row_ids.cpu(), steps)).to(logits.device)

    def last_share(self, logits: Tensor) -> Tensor:
        """The share of the last choice in the softmax of float32 logits ``[B, n]``, fp64 ``[B]``."""
        return logits.double().softmax(-1)[:, -1]

    def sample(self, hidden: Tensor, bias: Tensor, *rule) -> Tensor:
        """A token for each row of hidden states ``[B, D]``, int64 ``[B]``; ``rule``: as in `choose`."""
        return self.choose(self.logits(hidden, bias).float(), *rule)

    def linear(self, module: nn.Linear, x: Tensor) -> Tensor:
        """A linear layer of the codec's own."""
        return module(x)

    def linear_of_words(self, module: nn.Linear, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Such a layer over the embeddings of tokens: a table ``[n, D']``, and each token's row in it."""
        table = module(self.adapted.embedding(tokens.flatten()))
        return table, torch.arange(len(table), device=tokens.device).view(tokens.shape)


class EngineRuntime:
    """The base model as the engine runs it; for one thread at a time, others wait.

    Args:
        engine: made of the adapted model, with the variants `ENGINE_ADAPTERS`.
    """

    exact = True
    """A row has the same bits in every batch, so a pass tells what steps would write."""

    def __init__(self, adapted: AdaptedBase, engine: Engine) -> None:
        self.adapted, self.engine, self.name = adapted, engine, engine.precision
        self._lock = threading.RLock()
        self._packed: dict[nn.Linear, tuple[int, Tensor]] = {}
        self._words: dict[nn.Linear, tuple[int, Tensor]] = {}

    def hidden(self, embeds, position_ids, cu_seqlens, max_length, adapter, layers=None) -> Tensor:
        bounds = cu_seqlens.tolist()
        parts = [embeds.new_empty(0, embeds.shape[1])]
        with self._lock:
            self.engine.reserve(PASS_SEQUENCES, max(1, max_length))
            for first in range(0, len(bounds) - 1, PASS_SEQUENCES):
                cu = cu_seqlens[first : first + PASS_SEQUENCES + 1]
                rows = slice(bounds[first], int(cu[-1]))
                slots = self.engine.slots.acquire(len(cu) - 1)
                try:
                    parts.append(
                        self._forward(embeds[rows], position_ids[rows], cu - cu[0], slots, adapter, layers=layers)
                    )
                finally:
                    self.engine.slots.release(slots)
        return torch.cat(parts)

    @contextmanager
    def session(self, adapter, embeds, position_ids, cu_seqlens, new_rows, layers=None) -> Iterator[Session]:
        count = len(cu_seqlens) - 1
        with self._lock:
            self.engine.reserve(
                count + self.engine.slots.count - self.engine.slots.free, int(cu_seqlens.diff().max()) + new_rows
            )
            slots = self.engine.slots.acquire(count)
            try:
                yield EngineSession(self, adapter, embeds, position_ids, cu_seqlens, slots, layers)
            finally:
                self.engine.slots.release(slots)

    def logits(self, hidden, bias=None) -> Tensor:
        flat = self.engine.logits(hidden.flatten(0, -2), None if bias is None else bias.flatten(0, -2))
        return flat.unflatten(0, hidden.shape[:-1])

    def argmax(self, hidden, bias=None) -> Tensor:
        return self.engine.argmax(hidden.contiguous(), None if bias is None else bias.contiguous())

    def choose(self, logits, temperature, top_p, seed, row_ids, step) -> Tensor:
        if temperature == 0:
            return check_tokens(greatest(logits))
        steps = torch.full((len(logits),), step)
        return check_tokens(
            torch.ops.ztok.engine_draw(logits.contiguous(), float(temperature), float(top_p), seed, row_ids, steps)
        )

    def last_share(self, logits: Tensor) -> Tensor:
        weights = torch.ops.ztok.engine_weights(logits.contiguous(), 1.0)
        return weights[:, -1].double() / weights.sum(-1).double()

    def sample(self, hidden, bias, temperature, top_p, seed, row_ids, step) -> Tensor:
        if temperature == 0:
            return self.argmax(hidden, bias)
        steps = torch.full((len(hidden),), step)
        return self.engine.sample(hidden, temperature, top_p, seed, row_ids, steps, bias)

    def linear(self, module: nn.Linear, x: Tensor) -> Tensor:
        version, panels = self._packed.get(module, (None, None))
        if panels is None or version != module.weight._version:
            panels = ordered_pack(module.weight.detach().float())
            self._packed[module] = (module.weight._version, panels)
        return ordered_linear(x.float(), panels, module.out_features, None if module.bias is None else module.bias)

    def linear_of_words(self, module: nn.Linear, tokens: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.adapted.embedding.weight
        if len(weight) * module.out_features > WORD_TABLE:
            own, rows = tokens.unique(return_inverse=True)
            return self.linear(module, self.adapted.embedding(own)), rows
        # A row has the same bits in every table.
        version, table = self._words.get(module, (None, None))
        if table is None or version != module.weight._version:
            table = self.linear(module, weight.detach())
            self._words[module] = (module.weight._version, table)
        return table, tokens

    def _forward(self, embeds, position_ids, cu, slots, adapter, starts=None, layers=None) -> Tensor:
        return self.engine.forward(
            None,
            position_ids,
            cu.int(),
            slots,
            torch.zeros_like(slots) if starts is None else starts,
            self.engine.variants(adapter, len(slots)),
            embeds.float(),
            layers,
        )


class EngineSession:
    """Sequences in slots of the engine (see `Session`)."""

    def __init__(self, runtime: EngineRuntime, adapter, embeds, position_ids, cu_seqlens, slots, layers) -> None:
        self._runtime, self._adapter, self._slots, self._layers = runtime, adapter, slots, layers
        self._positions = position_ids[cu_seqlens[1:].long() - 1] + 1
        hidden = runtime._forward(embeds, position_ids, cu_seqlens, slots, adapter, layers=layers)
        self._lengths = cu_seqlens.diff().int()
        self._offsets = offsets(torch.ones(len(slots), dtype=torch.int64))
        self.last = hidden[cu_seqlens[1:].long() - 1]

    def draft(self, lengths: Tensor, conditioning, logit_bias, forced, choose: Choose | None = None) -> Tensor | None:
        """Write whole texts at once (`write_told`, `write_blocks`) where that beats steps, else ``None``; see
        `decode_text`."""
        told = 0 if forced is None else int((forced >= 0).sum())
        by_pass = choose is not None or told >= TOLD_SHARE * int(lengths.sum())
        if not by_pass and len(lengths) > DRAFTED_SEQUENCES:
            return None
        engine = self._runtime.engine
        adapters = engine.variants(self._adapter, len(lengths))
        sequences = Sequences(self._slots, adapters, self._lengths, self._positions, self.last)
        texts = Texts(lengths, conditioning, logit_bias, forced)
        written = write_told(engine, sequences, texts, choose) if by_pass else write_blocks(engine, sequences, texts)
        if measuring():
            passes = written.passes + 1  # with the one over the prefix
            count_rows(int(passes.sum()), int(passes.max()) * len(lengths))
        return written.tokens

    def step(self, embeds: Tensor, position_ids: Tensor) -> Tensor:
        going = len(embeds)
        self._lengths, self._slots = self._lengths[:going], self._slots[:going]
        self.last = self._runtime._forward(
            embeds,
            position_ids,
            self._offsets[: going + 1],
            self._slots,
            self._adapter,
            self._lengths,
            self._layers,
        )
        self._lengths = self._lengths + 1
        return self.last


Runtime = FloatRuntime | EngineRuntime

ENGINE_ADAPTERS = (*ADAPTERS, None)
"""The variants of the weights that a codec's engine needs; ``None`` is the bare base."""
