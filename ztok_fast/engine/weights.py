"""A model's weights in the form that the engine's C++ reads: one block of bytes, and a table of where things are in it.

`csrc/cpu/engine.h` describes the same layout from the other side. Raise `LAYOUT_VERSION` when it changes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from ztok_fast import ops
from ztok_fast.engine import store
from ztok_fast.engine.architecture import BASE, Architecture, Layer, Projection

LAYOUT_VERSION = 1
PRECISIONS = ("int8", "float32")
ALIGNMENT = 64
PANEL = 16
"""Output channels of one panel."""
DEPTH_STEP = 64
"""The depth of int8 panels is padded to a multiple of this."""
HEADER, RECORD = 32, 16
"""Entries of the layout's header, and of the record of one layer under one adapter."""

# Places in the header.
INV_FREQ, FINAL_NORM, HEAD, HEAD_SCALES, SOFTMAX_SCALE = range(12, 17)
# Places in a record. Linear layers take three each: panels, scales, bias.
INPUT_NORM, INNER_NORM, QUERY_NORM, KEY_NORM, QKV, OUT, GATE_UP, DOWN = 0, 1, 2, 3, 4, 7, 10, 13


@dataclass(frozen=True)
class PackedWeights:
    """What the engine's ops take.

    Attributes:
        blob: uint8, starts at a multiple of 64 bytes.
        layout: int64, see `LAYOUT_VERSION`.
        embeddings: float32 [V, D].
        adapters: names of the variants, in the order of their indices.
    """

    blob: Tensor
    layout: Tensor
    embeddings: Tensor
    adapters: tuple[str, ...]
    precision: str


class _Plan:
    """Parts of the block: their places are known before any of them is computed."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: list[tuple[list[tuple[int, int]], Callable[[], Sequence[Tensor]]]] = []

    def add(self, sizes: Sequence[int], make: Callable[[], Sequence[Tensor]]) -> list[int]:
        """Reserve places of so many bytes; `make` computes what goes there. Returns the offsets."""
        places = []
        for size in sizes:
            places.append((self.size, size))
            self.size += -(-size // ALIGNMENT) * ALIGNMENT
        self._parts.append((places, make))
        return [offset for offset, _ in places]

    def add_floats(self, size: int, make: Callable[[], Tensor]) -> int:
        return self.add([4 * size], lambda: [make()])[0]

    def fill(self, blob: Tensor) -> None:
        blob.zero_()
        for places, make in self._parts:
            for (offset, size), value in zip(places, make(), strict=True):
                blob[offset : offset + size].copy_(value.contiguous().view(-1).view(torch.uint8))


def pack(architecture: Architecture, precision: str = "int8", cache: bool = True) -> PackedWeights:
    """The weights of a model in the engine's form, computed or taken from the cache.

    Args:
        architecture: of `architecture.read`; each of its adapters becomes a variant of the weights. Variants share
            what is the same in them.
        precision: "int8" or "float32", see docs/determinism.md.
        cache: keep the result in the cache folder, and take it from there where it is found intact.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"engine: precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    plan = _Plan()
    with torch.no_grad():
        layout = _lay_out(architecture, precision, plan)
        embeddings = architecture.embeddings.to(torch.float32, copy=True).contiguous()
        blob = None
        if cache:
            key = fingerprint(architecture, precision)
            blob = store.load(key, plan.size)
        if blob is None:
            blob = store.aligned_bytes(plan.size)
            plan.fill(blob)
            if cache:
                store.save(key, blob)
    return PackedWeights(blob, layout, embeddings, architecture.adapters, precision)


def fingerprint(architecture: Architecture, precision: str) -> str:
    """SHA-256 of all that the packed weights depend on, in hexadecimal digits."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
        digest.update(json.dumps(value).encode() + b"\n")

    add([LAYOUT_VERSION, precision, asdict(architecture.settings), architecture.adapters])
    for layer in architecture.layers:
        add([{name: fold.scale for name, fold in p.folds.items()} for p in layer.projections()])
    for name, tensor in architecture.tensors():
        if name == "embeddings":
            continue  # they are taken from the model, not from the cache
        add([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _lay_out(architecture: Architecture, precision: str, plan: _Plan) -> Tensor:
    settings, adapters = architecture.settings, architecture.adapters
    layers = settings.layers
    layout = np.full(HEADER + len(adapters) * layers * RECORD, -1, np.int64)
    layout[:HEADER] = 0
    layout[:12] = [
        LAYOUT_VERSION,
        layers,
        settings.hidden,
        settings.heads,
        settings.kv_heads,
        settings.head_width,
        settings.intermediate,
        settings.vocabulary,
        len(adapters),
        PRECISIONS.index(precision),
        int(settings.head_norm),
        float_bits(settings.eps),
    ]
    layout[INV_FREQ] = plan.add_floats(
        len(settings.frequencies), lambda: torch.tensor(settings.frequencies, dtype=torch.float32)
    )
    layout[FINAL_NORM] = plan.add_floats(settings.hidden, architecture.norm.float)
    head = Projection(architecture.head, None, {})
    layout[HEAD : HEAD_SCALES + 1] = _linear(plan, precision, (head,), BASE)[:2]
    layout[SOFTMAX_SCALE] = float_bits(1 / math.sqrt(settings.head_width))
    for index, layer in enumerate(architecture.layers):
        _lay_out_layer(
            layout[HEADER:].reshape(len(adapters), layers, RECORD)[:, index], layer, adapters, precision, plan
        )
    return torch.from_numpy(layout)


def _lay_out_layer(records: np.ndarray, layer: Layer, adapters: Sequence[str], precision: str, plan: _Plan) -> None:
    """Write the records [adapters, `RECORD`] of one layer."""
    for place, norm in (
        (INPUT_NORM, layer.input_norm),
        (INNER_NORM, layer.inner_norm),
        (QUERY_NORM, layer.query_norm),
        (KEY_NORM, layer.key_norm),
    ):
        if norm is not None:
            records[:, place] = plan.add_floats(norm.numel(), norm.float)
    for place, group in (
        (QKV, (layer.query, layer.key, layer.value)),
        (OUT, (layer.out,)),
        (GATE_UP, (layer.gate, layer.up)),
        (DOWN, (layer.down,)),
    ):
        known: dict[str, list[int]] = {}
        for index, name in enumerate(adapters):
            variant = name if any(name in projection.folds for projection in group) else BASE
            if variant not in known:
                known[variant] = _linear(plan, precision, group, variant, interleave=place == GATE_UP)
            records[index, place : place + 3] = known[variant]


def _linear(
    plan: _Plan, precision: str, group: Sequence[Projection], adapter: str, interleave: bool = False
) -> list[int]:
    """Reserve one linear layer made of several, their output channels one after another; returns its three places.

    With `interleave` the channels of two layers alternate in panels.
    """
    depth = group[0].weight.shape[1]
    channels = sum(projection.weight.shape[0] for projection in group)
    padded = -(-channels // PANEL) * PANEL

    def together(parts: list[Tensor]) -> Tensor:
        if not interleave:
            return torch.cat(parts)
        return torch.stack([part.unflatten(0, (-1, PANEL)) for part in parts], 1).flatten(0, 2)

    def weight() -> Tensor:
        return together([folded(projection, adapter) for projection in group])

    def bias() -> Tensor:
        parts = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in group]
        return torch.nn.functional.pad(together([part.float() for part in parts]), (0, padded - channels))

    if precision == "int8":
        deep = -(-depth // DEPTH_STEP) * DEPTH_STEP
        places = plan.add([padded * deep, 4 * padded], lambda: ops.int8_pack(weight()))
    else:
        places = [*plan.add([4 * padded * depth], lambda: [ops.ordered_pack(weight())]), -1]
    if all(projection.bias is None for projection in group):
        return [*places, -1]
    return [*places, plan.add_floats(padded, bias)]


def folded(projection: Projection, adapter: str) -> Tensor:
    """The float32 weight of a linear layer with an adapter added, if it has it."""
    weight, fold = projection.weight.float(), projection.folds.get(adapter)
    if fold is None:
        return weight.contiguous()
    return ops.fold_lora(weight.contiguous(), fold.A.float().contiguous(), fold.B.float().contiguous(), fold.scale)


def float_bits(value: float) -> int:
    """The bits of a number rounded to binary32, as an integer."""
    return int(np.float32(value).view(np.int32))
