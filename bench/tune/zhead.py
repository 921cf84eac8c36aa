"""Candidates for the Z head."""

from __future__ import annotations

from collections.abc import Iterator

from bench.tune.entry import PLACE, Entry, size_of
from ztok_fast.ops.triton_tables import ANY
from ztok_fast.ops.zhead.triton_configs import Scan, Select


def _select(batch, width, size):
    def prepare():
        import torch

        from ztok_fast.ops.zhead import triton as zhead

        dtype = {2: torch.bfloat16, 4: torch.float32}[size]
        columns = PLACE.few(width)
        hidden = torch.randn(PLACE.few(batch), columns, device=PLACE.device).to(dtype)
        rows = torch.randn(PLACE.few(8192), columns, device=PLACE.device).to(dtype)
        return lambda: zhead.z_select(hidden, rows, 1.0, 1.0, 0, None, 0)

    return prepare


def entries() -> Iterator[Entry]:
    """All keys of the tables."""
    for key in ((16, 2), (16, 4), (ANY, 2), (ANY, 4)):
        halves = ((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 4)) if key[1] == 2 else ((64, 32, 8, 4), (64, 32, 4, 4))
        batches = (16,) if key[0] == 16 else (16, 32, 64)
        tiles = [(batch, *rest) for batch in batches for rest in halves]
        candidates = tuple(Scan(*tile) for tile in tiles)
        yield Entry("zhead", "SCAN", key, candidates, _select(size_of(key, 128), 2048, key[1]))
    blocks = tuple(Select(*block) for block in ((32, 64, 4), (32, 128, 4), (64, 64, 4), (64, 64, 8)))
    yield Entry("zhead", "SELECT", (ANY,), blocks, _select(64, 2048, 2))
