"""Continuous batching: prompts take slots as other texts end. Public as `Engine.generate`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ztok_fast.engine import checks
from ztok_fast.engine.sampling import NoToken

if TYPE_CHECKING:
    from ztok_fast.engine.engine import Engine


class _Choice:
    """How tokens are chosen, for all texts of a call."""

    def __init__(self, engine: Engine, temperature: float, top_p: float, seed: int, row_ids: Tensor) -> None:
        checks.sampling(temperature, top_p, seed, "at least 0")
        self.engine, self.temperature, self.top_p, self.seed, self.row_ids = engine, temperature, top_p, seed, row_ids

    def __call__(self, hidden: Tensor, texts: Tensor, counts: Tensor) -> Tensor:
        try:
            if self.temperature == 0:
                return self.engine.argmax(hidden)
            return self.engine.sample(hidden, self.temperature, self.top_p, self.seed, self.row_ids[texts], counts)
        except NoToken as error:
            name = f"prompts[{int(texts[error.row])}]"
            raise ValueError(f"engine: {name}: expected finite logits, got NaN or infinity from the model") from None


class _Running:
    """The texts that have a slot: one entry per text in each tensor."""

    NAMES = ("texts", "slots", "adapters", "lengths", "counts", "limits", "tokens")

    def __init__(self) -> None:
        whole, short = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
        self.texts, self.counts, self.limits, self.tokens = whole, whole, whole, whole
        self.slots, self.adapters, self.lengths = short, short, short

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, **values: Tensor) -> None:
        for name in self.NAMES:
            setattr(self, name, torch.cat([getattr(self, name), values[name]]))

    def keep(self, going: Tensor) -> None:
        for name in self.NAMES:
            setattr(self, name, getattr(self, name)[going])


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int] | Tensor],
    max_new_tokens: int | Sequence[int],
    adapter: str | Sequence[str | None] | None,
    temperature: float,
    top_p: float,
    seed: int,
    end_tokens: int | Sequence[int] | None,
    row_ids: Sequence[int] | None,
) -> list[list[int]]:
    """See `Engine.generate`."""
    rows = checks.prompts(prompts, engine.settings.vocabulary)
    limits = _limits(engine, rows, max_new_tokens)
    choose = _Choice(engine, temperature, top_p, seed, _row_ids(row_ids, len(rows)))
    variants = engine.variants(adapter, len(rows))
    ends = _end_tokens(engine, end_tokens)
    results: list[list[int]] = [[] for _ in rows]
    waiting = deque(index for index, limit in enumerate(limits.tolist()) if limit)
    if waiting and not engine.slots.free:
        raise ValueError("engine: slots: expected a free one to generate in, got none; release some")
    written = torch.empty(engine.slots.count, int(limits.max()) if len(rows) else 0, dtype=torch.int64)
    running = _Running()
    try:
        while waiting or len(running):
            entering = [waiting.popleft() for _ in range(min(len(waiting), engine.slots.free))]
            hidden = _enter(engine, running, entering, rows, limits, variants) if entering else _step(engine, running)
            tokens = choose(hidden, running.texts, running.counts)
            written[running.slots, running.counts] = running.tokens = tokens
            running.counts = running.counts + 1
            at_end = torch.isin(tokens, ends)
            ended = at_end | (running.counts == running.limits)
            if ended.any():
                lengths = (running.counts - at_end.long())[ended].tolist()
                for text, slot, length in zip(running.texts[ended].tolist(), running.slots[ended].tolist(), lengths):
                    results[text] = written[slot, :length].tolist()
                engine.slots.release(running.slots[ended])
                running.keep(~ended)
    finally:
        engine.slots.release(running.slots)
    return results


def _step(engine: Engine, running: _Running) -> Tensor:
    """Each running text reads its last token; hidden states [n, D]."""
    cu_rows = torch.arange(len(running) + 1, dtype=torch.int32)
    positions = running.lengths.long()
    hidden = engine.forward(running.tokens, positions, cu_rows, running.slots, running.lengths, running.adapters)
    running.lengths = running.lengths + 1
    return hidden


def _enter(
    engine: Engine, running: _Running, entering: list[int], rows: list[Tensor], limits: Tensor, variants: Tensor
) -> Tensor:
    """As `_step`, with new texts whose prompts are read in the same pass; they come after those that run."""
    old = len(running)
    texts, new = torch.tensor(entering), [rows[index] for index in entering]
    counts = torch.tensor([1] * old + [len(row) for row in new], dtype=torch.int32)
    cu_rows = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    tokens = torch.cat([running.tokens, *new])
    positions = torch.cat([running.lengths.long(), *(torch.arange(len(row)) for row in new)])
    nothing = torch.zeros(len(new), dtype=torch.int64)
    running.add(
        texts=texts,
        slots=engine.slots.acquire(len(new)),
        adapters=variants[texts],
        lengths=nothing.int(),
        counts=nothing,
        limits=limits[texts],
        tokens=nothing,
    )
    hidden = engine.forward(tokens, positions, cu_rows, running.slots, running.lengths, running.adapters)
    running.lengths = running.lengths + counts
    return hidden[cu_rows[1:].long() - 1]


def _limits(engine: Engine, rows: list[Tensor], max_new_tokens: Any) -> Tensor:
    many = isinstance(max_new_tokens, (list, tuple))
    values = list(max_new_tokens) if many else [max_new_tokens] * len(rows)
    if many and len(values) != len(rows):
        raise ValueError(f"engine: max_new_tokens: expected one number, or {len(rows)} of them, got {len(values)}")
    if not many:
        checks.integer("max_new_tokens", max_new_tokens, 0)
    for index, (row, limit) in enumerate(zip(rows, values)):
        limit = checks.integer(f"max_new_tokens[{index}]", limit, 0)
        # The last token is written and not read.
        if limit and len(row) + limit - 1 > engine.capacity:
            raise ValueError(
                f"engine: prompts[{index}]: expected a capacity of at least {len(row) + limit - 1} rows for {len(row)} "
                f"tokens and {limit} new ones, got {engine.capacity}; call reserve(capacity=...)"
            )
    return torch.tensor(values, dtype=torch.int64)


def _row_ids(row_ids: Any, count: int) -> Tensor:
    if row_ids is None:
        return torch.arange(count)
    try:
        ids = torch.as_tensor(row_ids)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"engine: row_ids: expected {count} integers, got {row_ids!r}") from None
    if count == 0 == ids.numel():
        return torch.arange(0)
    checks.tensor("row_ids", ids, (count,), torch.int64)
    return ids


def _end_tokens(engine: Engine, end_tokens: Any) -> Tensor:
    if end_tokens is None:
        end_tokens = engine.settings.end_tokens
    elif isinstance(end_tokens, int):
        end_tokens = (end_tokens,)
    for token in end_tokens:
        checks.integer("end_tokens", token, 0)
    return torch.tensor(sorted(end_tokens), dtype=torch.int64)
