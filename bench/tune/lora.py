"""Candidates for the LoRA linear layer."""

from __future__ import annotations

from collections.abc import Iterator

from bench.tune.entry import PLACE, Entry, size_of
from ztok_fast.ops.lora.triton_configs import Outer, Shrink, Tile
from ztok_fast.ops.triton_tables import ANY

HALF = (
    Tile(64, 128, 32, 32, 4, 4), Tile(64, 128, 64, 32, 4, 4), Tile(64, 128, 64, 32, 8, 4), Tile(64, 64, 64, 32, 4, 3),
    Tile(128, 64, 32, 32, 8, 4), Tile(128, 128, 32, 32, 8, 4), Tile(128, 128, 64, 32, 8, 3),
    Tile(128, 256, 64, 32, 8, 3),
)  # fmt: skip
SINGLES = (
    Tile(64, 64, 32, 16, 4, 3), Tile(64, 64, 32, 16, 8, 3), Tile(64, 64, 32, 32, 4, 3), Tile(64, 64, 32, 32, 8, 3),
    Tile(128, 64, 32, 16, 8, 3), Tile(128, 128, 32, 16, 8, 3),
)  # fmt: skip


def _arguments(rows, float32, several):
    """x [rows, 4096], a weight of 4096 x 4096 and four adapters of rank 16, in their order over the rows."""
    import torch

    rows, width, rank, dtype = PLACE.few(rows), PLACE.few(4096), 16, torch.float32 if float32 else torch.bfloat16
    make = lambda *shape: torch.randn(*shape, device=PLACE.device).to(dtype)  # noqa: E731
    adapters = (torch.arange(rows, device=PLACE.device) * 4 // rows).int() if several else None
    scaling = torch.ones(4, device=PLACE.device)
    return make(rows, width), make(width, width), make(4, rank, width), make(4, width, rank), scaling, adapters


def _linear(rows, float32, several):
    def prepare():
        from ztok_fast.ops.lora import triton as lora

        x, weight, A, B, scaling, adapters = _arguments(rows, float32, several)
        return lambda: lora.lora_linear(x, weight, None, A, B, scaling, adapters, None)

    return prepare


def _thin(rows, exact, outer):
    def prepare():
        from ztok_fast.ops.lora import triton as lora

        x, weight, A, B, scaling, adapters = _arguments(rows, exact, True)
        if not outer:
            return lambda: lora._shrink(x, A, scaling, adapters)
        low_rank = lora._shrink(x, A, scaling, adapters)
        return lambda: lora._outer(low_rank, x, adapters, A, weight.numel() // 4)

    return prepare


def entries() -> Iterator[Entry]:
    """All keys of the tables."""
    for several in (False, True):
        for bound in (512, ANY):
            key = (bound, False, several)
            yield Entry("lora", "LINEAR", key, HALF, _linear(size_of(key, 4096), False, several))
        yield Entry("lora", "LINEAR", (ANY, True, several), SINGLES, _linear(4096, True, several))
    for exact in (False, True):
        inner = (32, 64) if exact else (64, 128)
        shapes = [(rows, 64, step, 4, stages) for rows in (16, 32, 64) for step in inner for stages in (3, 4)]
        candidates = tuple(Shrink(*shape) for shape in shapes)
        for bound in (4096, ANY):
            yield Entry("lora", "SHRINK", (bound, exact), candidates, _thin(size_of((bound,), 16384), exact, False))
        outers = ((64, 64, 32, 512, 4, 3), (64, 128, 32, 512, 8, 3), (64, 64, 64, 512, 4, 3), (32, 64, 32, 512, 4, 3))
        candidates = tuple(Outer(*shape) for shape in outers)
        yield Entry("lora", "OUTER", (ANY, exact), candidates, _thin(16384, exact, True))
