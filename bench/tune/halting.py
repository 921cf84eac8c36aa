"""Candidates for halting and integration."""

from __future__ import annotations

from collections.abc import Iterator

from bench.tune.entry import PLACE, Entry, size_of
from ztok_fast.ops.halting.triton_configs import Offsets, Rows, Scan, Totals
from ztok_fast.ops.triton_tables import ANY


def _inputs(rows, sequences):
    """Mass of which every fourth row ends a unit, and offsets."""
    import torch

    rows = PLACE.few(rows)
    cu_seqlens = torch.linspace(0, rows, PLACE.few(sequences) + 1, device=PLACE.device).long()
    return torch.full((rows,), 0.25, device=PLACE.device), cu_seqlens


def _units(rows, sequences):
    def prepare():
        from ztok_fast.ops.halting import triton as halting

        mass, cu_seqlens = _inputs(rows, sequences)
        return lambda: halting.find_units(mass, cu_seqlens, 1.0, "fire", mass.shape[0] // 2)

    return prepare


def _later(rows):
    def prepare():
        import torch

        from ztok_fast.ops.halting import triton as halting

        mass, cu_seqlens = _inputs(rows, 16)
        grad = torch.randn(mass.shape[0], 2, device=PLACE.device)
        return lambda: halting.halting_units_backward(mass, cu_seqlens, grad, 1.0, "fire")

    return prepare


def _integration(width, wide, backward):
    def prepare():
        import torch

        from ztok_fast.ops.halting import triton as halting

        mass, cu_seqlens = _inputs(65536, 64)
        count, columns = mass.shape[0], PLACE.few(width)
        dtype = torch.float64 if wide else torch.bfloat16
        rows = torch.randn(count, columns, device=PLACE.device).to(dtype)
        (weights, ends, unit, _, cu_units), table = halting.find_units(mass, cu_seqlens, 1.0, "fire", count // 4)
        means = torch.empty(count // 4, columns, device=PLACE.device, dtype=dtype)
        halting.unit_means(rows, weights, table, cu_units, means)
        if not backward:
            return lambda: halting.unit_means(rows, weights, table, cu_units, means)
        grad = torch.randn_like(means)
        return lambda: halting.row_gradients(rows, weights, unit, ends, cu_units, table, means, grad)

    return prepare


def entries() -> Iterator[Entry]:
    """All keys of the tables."""
    scans = tuple(Scan(rows, 256, warps) for rows, warps in ((256, 4), (512, 4), (1024, 4), (1024, 8), (2048, 8)))
    for bound in (1024, 65536, ANY):
        yield Entry("halting", "SCAN", (bound,), scans, _units(size_of((bound,), 1 << 20), 16))
    for bound in (65536, ANY):
        yield Entry("halting", "LATER", (bound,), scans, _later(size_of((bound,), 1 << 20)))
    blocks = tuple(Offsets(*shape) for shape in ((256, 4), (256, 2), (1024, 4), (1024, 8)))
    for bound in (256, ANY):
        yield Entry("halting", "OFFSETS", (bound,), blocks, _units(65536, size_of((bound,), 4096)))
    totals = tuple(Totals(*shape) for shape in ((128, 4, 4), (128, 8, 4), (64, 4, 2), (256, 4, 8)))
    yield Entry("halting", "TOTALS", (ANY,), totals, _integration(64, False, True))
    for wide in (False, True):
        narrow = tuple(Rows(*shape) for shape in ((4, 128, 1), (8, 128, 1), (8, 128, 2), (16, 128, 4)))
        broad = tuple(Rows(*shape) for shape in ((4, 512, 4), (4, 256, 2), (8, 512, 4), (4, 1024, 8)))
        yield Entry("halting", "MEANS", (128, wide), narrow, _integration(128, wide, False))
        yield Entry("halting", "MEANS", (ANY, wide), broad, _integration(576, wide, False))
        steps = ((16, 16, 4), (16, 32, 4), (8, 32, 4))
        steps = steps if wide else ((16, 128, 4), (16, 64, 4), (8, 128, 4), (32, 64, 8))
        candidates = tuple(Rows(*step) for step in steps)
        yield Entry("halting", "GRADIENTS", (ANY, wide), candidates, _integration(576, wide, True))
