"""The engine's passes on a GPU: the arithmetic of docs/determinism.md in Triton kernels.

A pass in which every sequence has one row is a step. It runs in buffers that stay, and on a CUDA device it is one CUDA
graph per number of rows. Other passes launch kernel after kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ztok_fast.engine import weights as packed
from ztok_fast.engine.architecture import Settings
from ztok_fast.engine.sampling import draw, greatest
from ztok_fast.engine.triton import attention, gated, rms_norm, rotary_angles, rotate
from ztok_fast.engine.weights import PackedWeights
from ztok_fast.ops.int8 import triton as linear

MOST_STEP_ROWS = 256
TOKEN, POSITION, SLOT, SEEN, ADAPTER = range(5)
"""Rows of the table [5, R] that describes a pass. SEEN: keys that a row sees, its own included; 0 for padding."""


class _Rows:
    """The rows of a pass: the table, and how linear layers share them among adapters."""

    def __init__(self, table: Tensor) -> None:
        self.count, self.device = table.shape[1], table.device
        self.tokens, self.positions, self.slots, self.seen, self.adapters = table
        self._plans: dict[int, linear.Plan] = {}

    def plan(self, variants: int) -> linear.Plan:
        if variants not in self._plans:
            adapters = self.adapters if variants > 1 else None
            self._plans[variants] = linear.plan(self.count, variants, adapters, None, self.device)
        return self._plans[variants]


@dataclass(frozen=True)
class _Linear:
    """A linear layer under each adapter; one entry where all adapters have the same weight."""

    panels: Tensor
    scales: Tensor | None
    bias: Tensor | None
    out_features: int

    def __call__(self, x: Tensor, rows: _Rows) -> Tensor:
        variants = len(self.panels)
        if self.scales is not None:
            return linear.multiply(x, self.panels, self.scales, self.out_features, self.bias, rows.plan(variants))
        y = linear.ordered_linear(x, self.panels[0], self.out_features, self.bias)
        for variant in range(1, variants):
            other = linear.ordered_linear(x, self.panels[variant], self.out_features, self.bias)
            y = torch.where((rows.adapters == variant)[:, None], other, y)
        return y


def _stack(parts: list[Tensor]) -> Tensor:
    """All in one tensor; a view where there is one."""
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    inner_norm: Tensor
    head_norms: Tensor | None
    qkv: _Linear
    out: _Linear
    gate_up: _Linear
    down: _Linear


class _Reader:
    """Reads packed weights on their device: views of the block, or copies where variants differ."""

    def __init__(self, weights: PackedWeights, settings: Settings, device: torch.device) -> None:
        self.blob = weights.blob.to(device)
        records = weights.layout[packed.HEADER :].view(len(weights.adapters), settings.layers, packed.RECORD)
        self.header, self.records = weights.layout[: packed.HEADER].tolist(), records.tolist()
        self.is_int8, self.settings = weights.precision == "int8", settings

    def part(self, offset: int, dtype: torch.dtype, *shape: int) -> Tensor:
        return self.blob[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def floats(self, offset: int, *shape: int) -> Tensor:
        return self.part(offset, torch.float32, *shape)

    def linear(self, offsets: list[list[int]], out: int, depth: int) -> _Linear:
        """A linear layer from its (panels, scales, bias) under each adapter."""
        if all(place == offsets[0] for place in offsets):
            offsets = offsets[:1]
        count = -(-out // packed.PANEL)
        panels, scales = [], None
        for place, _, _ in offsets:
            if self.is_int8:
                quads = -(-depth // packed.DEPTH_STEP) * packed.DEPTH_STEP // 4
                panels.append(self.part(place, torch.uint8, count, quads, packed.PANEL, 4))
            else:
                panels.append(self.floats(place, count, depth, packed.PANEL))
        if self.is_int8:
            scales = _stack([self.floats(place, count * packed.PANEL) for _, place, _ in offsets])
        bias = None if offsets[0][2] < 0 else self.floats(offsets[0][2], out)  # an adapter has none of its own
        return _Linear(_stack(panels), scales, bias, out)

    def layer(self, index: int) -> _Layer:
        s, records = self.settings, [record[index] for record in self.records]
        first = records[0]

        def of(place: int, out: int, depth: int) -> _Linear:
            return self.linear([record[place : place + 3] for record in records], out, depth)

        norms = [
            self.floats(first[place], s.head_width) for place in (packed.QUERY_NORM, packed.KEY_NORM)[: 2 * s.head_norm]
        ]
        return _Layer(
            self.floats(first[packed.INPUT_NORM], s.hidden),
            self.floats(first[packed.INNER_NORM], s.hidden),
            torch.stack(norms) if norms else None,
            of(packed.QKV, (s.heads + 2 * s.kv_heads) * s.head_width, s.hidden),
            of(packed.OUT, s.hidden, s.heads * s.head_width),
            of(packed.GATE_UP, 2 * s.intermediate, s.hidden),
            of(packed.DOWN, s.hidden, s.intermediate),
        )


class _Step:
    """A pass of `count` rows in buffers that stay. On a CUDA device it is a graph, which is recorded here."""

    def __init__(self, run: Callable[[Tensor, Tensor | None], Tensor], count: int, width: int | None, device, pool):
        with torch.inference_mode(False):  # steps with and without it use them
            self.table = torch.zeros(5, count, dtype=torch.int64, device=device)
            self.vectors = None if width is None else torch.zeros(count, width, device=device)
        self._run, self._graph = run, None
        if device.type != "cuda":
            return
        self.table[TOKEN] = -1  # padding, all of it: a trial run caches nothing
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run(self.table, self.vectors)  # compiles what has to be compiled
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._hidden = run(self.table, self.vectors)

    def __call__(self, table: Tensor, vectors: Tensor | None) -> Tensor:
        count = table.shape[1]
        self.table.copy_(torch.nn.functional.pad(table, (0, self.table.shape[1] - count)))
        self.table[TOKEN, count:] = -1
        if self.vectors is not None and vectors is not None:
            self.vectors[:count].copy_(vectors)
        if self._graph is None:
            return self._run(self.table, self.vectors)[:count]
        self._graph.replay()
        return self._hidden[:count].clone()


class CudaPasses:
    """What `torch.ops.ztok.engine_*` are on the CPU, for a model whose weights are copied to a GPU.

    Tokens, positions, slots and what else describes a pass are on the CPU, hidden states on the GPU.

    Args:
        device: a CUDA device; in tests the CPU, where Triton's interpreter runs the kernels.
    """

    def __init__(self, weights: PackedWeights, settings: Settings, device: torch.device) -> None:
        self.settings, self.device, self.adapters = settings, device, len(weights.adapters)
        self.scale = 1 / math.sqrt(settings.head_width)
        with torch.no_grad(), torch.inference_mode(False):
            reader = _Reader(weights, settings, device)
            self.is_int8 = reader.is_int8
            self.embeddings = weights.embeddings.to(device)
            self.frequencies = reader.floats(reader.header[packed.INV_FREQ], settings.head_width // 2)
            self.norm = reader.floats(reader.header[packed.FINAL_NORM], settings.hidden)
            head = [*reader.header[packed.HEAD : packed.HEAD_SCALES + 1], -1]
            self.head = reader.linear([head], settings.vocabulary, settings.hidden)
            self.layers = [reader.layer(index) for index in range(settings.layers)]
        self._arenas: tuple[Tensor, Tensor] | None = None
        self._steps: dict[tuple[int, bool], _Step] = {}
        self._pool: Any = None

    @torch.no_grad()
    def forward(
        self, keys, values, tokens, vectors, positions, cu_rows, slots, starts, adapters, layers
    ) -> Tensor:  # fmt: skip
        """One pass; `Engine.forward` says what the arguments are."""
        rows = len(tokens)
        counts = self._check(keys, tokens, positions, cu_rows, slots, starts, adapters, layers)
        if rows == 0:
            return torch.empty(0, self.settings.hidden, device=self.device)
        sequence = torch.arange(len(slots)).repeat_interleave(counts)
        seen = starts.long()[sequence] + torch.arange(rows) - cu_rows.long()[sequence] + 1
        table = torch.stack([tokens, positions, slots.long()[sequence], seen, adapters.long()[sequence]])
        if rows == len(slots) <= MOST_STEP_ROWS and layers == self.settings.layers and bool((counts == 1).all()):
            return self._step(keys, values, rows, vectors is not None)(table, vectors)
        return self._pass(keys, values, table.to(self.device), vectors, int(seen.max()), layers)

    def _check(self, keys, tokens, positions, cu_rows, slots, starts, adapters, layers) -> Tensor:
        """Refuse values out of range; returns the rows of each sequence."""
        s, counts = self.settings, cu_rows.long().diff()
        if int(cu_rows[0]) != 0 or int(cu_rows[-1]) != len(tokens) or bool((counts < 0).any()):
            raise ValueError(
                f"engine: cu_rows: expected rising from 0 to the {len(tokens)} rows, got {cu_rows.tolist()}"
            )
        for name, value, least, most in (
            ("tokens", tokens, -1, s.vocabulary - 1),
            ("positions", positions, 0, 2**24 - 1),
            ("slots", slots, 0, keys.shape[1] - 1),
            ("adapters", adapters, 0, self.adapters - 1),
            ("starts", starts, 0, None),
            ("starts + rows of a sequence", starts.long() + counts, 0, keys.shape[3] * packed.PANEL),
            ("layers", torch.tensor([layers]), 1, s.layers),
        ):
            if not value.numel():
                continue
            low, high = (int(bound) for bound in value.aminmax())
            if low < least or most is not None and high > most:
                expected = f"at least {least}" if most is None else f"from {least} to {most}"
                raise ValueError(f"engine: {name}: expected {expected}, got {low if low < least else high}")
        if len(slots.unique()) < len(slots):
            raise ValueError(f"engine: slots: expected each once, got {slots.tolist()}")
        return counts

    def _step(self, keys: Tensor, values: Tensor, rows: int, with_vectors: bool) -> _Step:
        """The step of at least so many rows; it is made for a power of two."""
        if self._arenas is None or self._arenas[0] is not keys or self._arenas[1] is not values:
            self._steps.clear()  # graphs hold addresses
            self._arenas = keys, values
        if self._pool is None and self.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        kind = triton.next_power_of_2(rows), with_vectors
        if kind not in self._steps:
            longest = keys.shape[3] * packed.PANEL

            def run(table: Tensor, vectors: Tensor | None) -> Tensor:
                return self._pass(keys, values, table, vectors, longest, self.settings.layers)

            width = self.settings.hidden if with_vectors else None
            self._steps[kind] = _Step(run, kind[0], width, self.device, self._pool)
        return self._steps[kind]

    def _pass(self, keys, values, table: Tensor, vectors: Tensor | None, longest: int, layers: int) -> Tensor:
        """All of it on the device, nothing waits for the host. `longest`: most keys that a row may see."""
        rows = _Rows(table)
        with torch.cuda.device_of(self.embeddings):
            x = torch.where((rows.tokens >= 0)[:, None], self.embeddings[rows.tokens.clamp(min=0)], 0.0)
            if vectors is not None:
                x = x + vectors
            angles, eps = rotary_angles(rows.positions, self.frequencies), self.settings.eps
            for index, layer in enumerate(self.layers[:layers]):
                arenas = keys[index], values[index]
                qkv = layer.qkv(rms_norm(x, layer.input_norm, eps), rows)
                queries = rotate(qkv, layer.head_norms, angles, rows.slots, rows.seen, *arenas, eps)
                attended = attention(queries, *arenas, rows.slots, rows.seen, longest, self.scale)
                x = x + layer.out(attended, rows)
                inner = gated(layer.gate_up(rms_norm(x, layer.inner_norm, eps), rows))
                x = x + layer.down(inner, rows)
            return rms_norm(x, self.norm, eps)

    @torch.no_grad()
    def logits(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """As `Engine.logits`."""
        x = hidden if bias is None else hidden + bias
        if not len(x):
            return x.new_empty(0, self.settings.vocabulary)
        table = torch.zeros(5, len(x), dtype=torch.int64, device=self.device)
        with torch.cuda.device_of(x):
            return self.head(x.contiguous(), _Rows(table))

    def argmax(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """As `Engine.argmax`, with -1 in rows that have no token; the tokens are on the CPU."""
        return greatest(self.logits(hidden, bias))

    def sample(self, hidden, bias, temperature: float, top_p: float, seed: int, row_ids, steps) -> Tensor:
        """As `Engine.sample`, with -1 in rows that have no token; the tokens are on the CPU."""
        return draw(self.logits(hidden, bias), temperature, top_p, seed, row_ids, steps)
