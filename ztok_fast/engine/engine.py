"""The engine: a model's weights, key-value arenas, and the passes over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ztok_fast import native
from ztok_fast.engine import checks
from ztok_fast.engine.architecture import BASE, EngineUnsupported, Settings, read
from ztok_fast.engine.generate import generate
from ztok_fast.engine.sampling import check_tokens
from ztok_fast.engine.sequences import Sequences, Slots
from ztok_fast.engine.weights import PackedWeights, pack
from ztok_fast.profiling import HEAD, MODEL, stage

if TYPE_CHECKING:
    from ztok_fast.engine.cuda import CudaPasses

KEYS_OF_A_BLOCK = 16
Tokens = Sequence[int] | Tensor


class Engine:
    """Runs a model, with the same bits for a row whatever else runs. Make one with `Engine.from_model`.

    The key-value arenas have a fixed number of slots, one per sequence, and a fixed number of rows per slot. No pass
    allocates more of them; `reserve` makes them larger. Memory is taken as rows are written.

    One engine is for one thread at a time; on the CPU a pass uses all threads of torch. On a CUDA device hidden states,
    logits, vectors and biases are there, and all other arguments and results on the CPU.

    Attributes:
        settings: sizes of the model.
        adapters: names of the variants of the weights; "base" is the model without an adapter.
        precision: "int8" or "float32".
        device: where the weights and the arenas are.
        slots: the slot manager; `engine.slots.acquire(n)` and `engine.slots.release(slots)` go with `forward`.
    """

    def __init__(
        self,
        weights: PackedWeights,
        settings: Settings,
        slots: int = 16,
        capacity: int = 1024,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.empty(0, device=device).device  # with its index
        self._passes: CudaPasses | None = None
        if self.device.type == "cpu":
            part = native.status("cpu")
            if not part.available:
                raise EngineUnsupported(f"engine: expected the compiled library for the CPU, got none: {part.reason}")
            checks.processor()
        else:
            self._passes = passes_on(self.device, weights, settings)
        self.weights, self.settings = weights, settings
        self.adapters, self.precision = weights.adapters, weights.precision
        self._variants = {name: index for index, name in enumerate(weights.adapters)}
        self.slots = Slots(0)
        self.capacity = 0
        self.keys = self.values = torch.empty(0)
        self.reserve(slots, capacity)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        adapters: str | Sequence[str | None] | None = None,
        precision: str = "int8",
        slots: int = 16,
        capacity: int = 1024,
        cache: bool = True,
    ) -> Engine:
        """An engine for a Hugging Face model. Later changes of the model do not reach it.

        Args:
            model: `LlamaForCausalLM` (Llama, SmolLM), `MistralForCausalLM`, `Qwen2ForCausalLM` or `Qwen3ForCausalLM`
                on the CPU or on a CUDA device, where the engine then runs, or a `peft.PeftModel` with LoRA adapters on
                one.
            adapters: names of LoRA adapters. Each becomes a variant of the weights with the adapter folded in; one
                batch may mix them. None or "base" is the model without an adapter, and the default.
            precision: "int8" (weights and activations in 8 bits) or "float32".
            slots: sequences that run at the same time.
            capacity: rows (tokens) of a sequence, rounded up to a multiple of 16.
            cache: keep the packed weights in the cache folder (`$XDG_CACHE_HOME/ztok_fast/engine`) and map them from
                there the next time.

        Raises:
            EngineUnsupported: the engine cannot run this model, or not on this processor; the message says why.
            ValueError: unknown adapters or precision, sizes below 1, a capacity above the model's sliding window.
        """
        found = read(model, adapters)
        return cls(pack(found, precision, cache), found.settings, slots, capacity, next(model.parameters()).device)

    def reserve(self, slots: int | None = None, capacity: int | None = None) -> None:
        """Make the arenas larger; sequences in them stay. Sizes that they have already change nothing.

        Raises:
            ValueError: a size below 1, or a capacity above the model's sliding window.
        """
        s = self.settings
        slots = self.slots.count if slots is None else checks.integer("slots", slots, 1)
        capacity = self.capacity if capacity is None else checks.integer("capacity", capacity, 1)
        if s.window is not None and capacity > s.window:
            raise ValueError(f"engine: capacity: expected at most the sliding window of {s.window}, got {capacity}")
        slots, capacity = max(slots, self.slots.count), max(capacity, self.capacity)
        if (slots, capacity) == (self.slots.count, self.capacity):
            return
        blocks = -(-capacity // KEYS_OF_A_BLOCK)
        with torch.inference_mode(False):  # passes with and without it may use them
            kind: Any = {"dtype": torch.float16 if self.precision == "int8" else torch.float32, "device": self.device}
            keys = torch.empty(s.layers, slots, s.kv_heads, blocks, s.head_width, KEYS_OF_A_BLOCK, **kind)
            values = torch.empty(s.layers, slots, s.kv_heads, blocks * KEYS_OF_A_BLOCK, s.head_width, **kind)
        if self.slots.count:
            old = self.keys.shape[3]
            keys[:, : self.slots.count, :, :old] = self.keys
            values[:, : self.slots.count, :, : old * KEYS_OF_A_BLOCK] = self.values
        self.keys, self.values, self.capacity = keys, values, capacity
        self.slots.grow(slots)

    def variant(self, adapter: str | None) -> int:
        """The index of a variant of the weights by the adapter's name.

        None is the only variant there is, or "base" among several.
        """
        name: Any = adapter
        if adapter is None:
            name = self.adapters[0] if len(self.adapters) == 1 else BASE
        if not isinstance(name, str) or name not in self._variants:
            raise ValueError(f"engine: adapter: expected one of {list(self.adapters)}, got {adapter!r}")
        return self._variants[name]

    def variants(self, adapter: str | Sequence[str | None] | None, count: int) -> Tensor:
        """Indices, int32 [count], of one adapter for all sequences or one for each."""
        if adapter is None or isinstance(adapter, str):
            return torch.full((count,), self.variant(adapter), dtype=torch.int32)
        if len(adapter) != count:
            raise ValueError(f"engine: adapter: expected one name, or {count} of them, got {len(adapter)}")
        return torch.tensor([self.variant(name) for name in adapter], dtype=torch.int32)

    def forward(
        self,
        tokens: Tensor | None,
        positions: Tensor,
        cu_rows: Tensor,
        slots: Tensor,
        starts: Tensor,
        adapters: Tensor | None = None,
        vectors: Tensor | None = None,
        layers: int | None = None,
    ) -> Tensor:
        """One pass over packed rows: the rows of sequence b are cu_rows[b] to cu_rows[b + 1].

        Row t of a sequence is stored as row starts[b] + t of its slot and attends to all rows up to itself. Rows that
        the slot held from there on are overwritten. This is the low level: it does not know which slots are taken.

        Args:
            tokens: int64 [R]; -1, or None for all: a row without an embedding.
            positions: int64 [R], from 0 to 2²⁴ − 1, which floats hold exactly.
            cu_rows: int32 [B + 1].
            slots, starts: int32 [B]; the slots are distinct.
            adapters: int32 [B], of `variants`; None is `variant(None)` for all.
            vectors: float32 [R, D], added to the embeddings; None for nothing.
            layers: run the first so many layers only.

        Returns:
            float32 [R, D], hidden states after the final norm.

        Raises:
            ValueError, RuntimeError: shapes that do not fit, values out of range, rows above the capacity.
        """
        checks.tensor("positions", positions, (None,), torch.int64)
        rows = len(positions)
        if tokens is None:
            tokens = torch.full((rows,), -1)
        checks.tensor("tokens", tokens, (rows,), torch.int64)
        checks.tensor("slots", slots, (None,), torch.int32)
        count = len(slots)
        checks.tensor("cu_rows", cu_rows, (count + 1,), torch.int32)
        checks.tensor("starts", starts, (count,), torch.int32)
        if adapters is None:
            adapters = self.variants(None, count)
        checks.tensor("adapters", adapters, (count,), torch.int32)
        if vectors is not None:
            checks.tensor("vectors", vectors, (rows, self.settings.hidden), torch.float32, self.device)
        layers = self.settings.layers if layers is None else checks.integer("layers", layers, 1)
        with stage(MODEL, rows, layers):
            if self._passes is not None:
                return self._passes.forward(
                    self.keys, self.values, tokens, vectors, positions, cu_rows, slots, starts, adapters, layers
                )
            return torch.ops.ztok.engine_forward(
                self.weights.blob,
                self.weights.layout,
                self.keys,
                self.values,
                self.weights.embeddings,
                tokens.contiguous(),
                None if vectors is None else vectors.contiguous(),
                positions.contiguous(),
                cu_rows.contiguous(),
                slots.contiguous(),
                starts.contiguous(),
                adapters.contiguous(),
                layers,
            )

    def prefill(
        self,
        prompts: Sequence[Tokens],
        adapter: str | Sequence[str | None] | None = None,
        vectors: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Sequences:
        """Take a slot for each prompt and read the prompts.

        Args:
            prompts: token ids, at least one each.
            adapter: a name for all, or one for each prompt; see `variant`.
            vectors: float32 [R, D], added to the embeddings of the R tokens of all prompts, one prompt after another.
            positions: int64 [R]; None counts each prompt's tokens from 0.

        Returns:
            The sequences, with the hidden state of the last token of each. `release` them when they are done.

        Raises:
            ValueError: a prompt is empty, too long for the arenas or has unknown tokens; too few slots are free.
        """
        rows = checks.prompts(prompts, self.settings.vocabulary)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        for index, length in enumerate(lengths.tolist()):
            if length > self.capacity:
                raise ValueError(
                    f"engine: prompts[{index}]: expected at most {self.capacity} tokens, the capacity, got {length}; "
                    "call reserve(capacity=...)"
                )
        variants = self.variants(adapter, len(rows))
        if positions is None:
            positions = torch.cat([torch.arange(len(row)) for row in rows]) if rows else torch.empty(0).long()
        else:
            checks.tensor("positions", positions, (int(lengths.sum()),), torch.int64)
        tokens = torch.cat(rows) if rows else torch.empty(0).long()
        if vectors is not None:
            checks.tensor("vectors", vectors, (len(tokens), self.settings.hidden), torch.float32, self.device)
        cu_rows = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        slots = self.slots.acquire(len(rows))
        try:
            hidden = self.forward(tokens, positions, cu_rows, slots, torch.zeros_like(slots), variants, vectors)
        except BaseException:
            self.slots.release(slots)
            raise
        last = cu_rows[1:].long() - 1
        return Sequences(slots, variants, lengths, positions[last] + 1, hidden[last])

    def step(self, sequences: Sequences, tokens: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Append one token to each sequence; returns the hidden states [B, D], which `sequences.hidden` is then.

        Args:
            tokens: int64 [B]; -1: a row without an embedding. vectors: float32 [B, D], added to the embeddings.

        Raises:
            ValueError, RuntimeError: a slot is full; shapes that do not fit, tokens that the model does not have.
        """
        count = len(sequences)
        checks.tensor("tokens", tokens, (count,), torch.int64)
        sequences.hidden = self.forward(
            tokens,
            sequences.positions,
            torch.arange(count + 1, dtype=torch.int32),
            sequences.slots,
            sequences.lengths,
            sequences.adapters,
            vectors,
        )
        sequences.lengths = sequences.lengths + 1
        sequences.positions = sequences.positions + 1
        return sequences.hidden

    def keep(self, sequences: Sequences, going: Tensor) -> Sequences:
        """Keep the sequences where bool [B] `going` is set, in place; the slots of the others are released."""
        checks.tensor("going", going, (len(sequences),), torch.bool)
        self.slots.release(sequences.slots[~going])
        for name, value in vars(sequences).items():
            setattr(sequences, name, value[going])
        return sequences

    def release(self, sequences: Sequences) -> None:
        """Give the slots of all sequences back; none is left then."""
        self.keep(sequences, torch.zeros(len(sequences), dtype=torch.bool))

    def generate(
        self,
        prompts: Sequence[Tokens],
        max_new_tokens: int | Sequence[int],
        adapter: str | Sequence[str | None] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        end_tokens: int | Sequence[int] | None = None,
        row_ids: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continue every prompt. A prompt's tokens are the same whatever else runs and however many slots there are.

        Any number of prompts: they wait for a free slot and take one as soon as another has ended.

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: for all, or one number for each prompt.
            adapter: a name for all, or one for each prompt; see `variant`.
            temperature: 0 takes the token with the highest logit. Above 0: the model's logits are divided by it and a
                token is drawn.
            top_p: draw among the most probable tokens that together have this probability.
            seed, row_ids: a draw depends on the seed, the prompt's row id (its index if None) and the number of tokens
                written before.
            end_tokens: tokens that end a text; None takes the model's own, () none.

        Returns:
            The new tokens of each prompt, without the end token.

        Raises:
            ValueError: prompts that are empty, too long for the arenas or of unknown tokens; other values out of range;
                no slot is free.
        """
        return generate(self, prompts, max_new_tokens, adapter, temperature, top_p, seed, end_tokens, row_ids)

    def logits(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits, float32 [r, V], of hidden states [r, D]; `bias` [r, D] is added to the hidden states first."""
        self._check_hidden(hidden, bias)
        with stage(HEAD, len(hidden)):
            if self._passes is not None:
                return self._passes.logits(hidden, bias)
            return torch.ops.ztok.engine_logits(self.weights.blob, self.weights.layout, hidden, bias)

    def argmax(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """The token with the highest logit, int64 [r]; the lowest of several.

        Raises:
            ValueError: a row has no token, because a logit is NaN or the highest is not finite; `sample` too.
        """
        self._check_hidden(hidden, bias)
        with stage(HEAD, len(hidden)):
            if self._passes is not None:
                return check_tokens(self._passes.argmax(hidden, bias))
            return check_tokens(torch.ops.ztok.engine_argmax(self.weights.blob, self.weights.layout, hidden, bias))

    def sample(
        self,
        hidden: Tensor,
        temperature: float,
        top_p: float,
        seed: int,
        row_ids: Tensor,
        steps: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Tokens drawn from the softmax of the logits, int64 [r].

        A draw depends on the logits of its row and on (seed, row id, step) alone.

        Args:
            temperature: above 0. top_p: above 0 and at most 1: draw among the most probable tokens that together have
                this probability.
            row_ids, steps: int64 [r].
        """
        self._check_hidden(hidden, bias)
        checks.sampling(temperature, top_p, seed)
        for name, value in (("row_ids", row_ids), ("steps", steps)):
            checks.tensor(name, value, (len(hidden),), torch.int64)
        with stage(HEAD, len(hidden)):
            options = float(temperature), float(top_p), seed, row_ids.contiguous(), steps.contiguous()
            if self._passes is not None:
                return check_tokens(self._passes.sample(hidden, bias, *options))
            return check_tokens(
                torch.ops.ztok.engine_sample(self.weights.blob, self.weights.layout, hidden, bias, *options)
            )

    def _check_hidden(self, hidden: Tensor, bias: Tensor | None) -> None:
        checks.tensor("hidden", hidden, (None, self.settings.hidden), torch.float32, self.device)
        if bias is not None:
            checks.tensor("bias", bias, tuple(hidden.shape), torch.float32, self.device)


def passes_on(device: torch.device, weights: PackedWeights, settings: Settings) -> CudaPasses:
    """The passes on a CUDA device, which need Triton."""
    if device.type != "cuda":
        raise EngineUnsupported(f"engine: device: expected the CPU or a CUDA device, got {device}")
    try:
        from ztok_fast.engine.cuda import CudaPasses
    except ImportError as error:
        raise EngineUnsupported(f"engine: expected Triton for {device}, got none: {error}") from None
    return CudaPasses(weights, settings, device)
