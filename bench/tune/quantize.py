"""Candidates for the fused quantise: the projection of units, and the normalisation of wide latents."""

from __future__ import annotations

from collections.abc import Iterator

from bench.tune.entry import PLACE, Entry, size_of
from ztok_fast.ops.quantize.triton_configs import Project, Rows
from ztok_fast.ops.triton_tables import ANY


def _project(width):
    def prepare():
        import torch

        from ztok_fast.ops.halting import triton as halting
        from ztok_fast.ops.quantize import triton as quantize

        rows, hidden_width, total_units, columns = map(PLACE.few, (32768, 576, 8192, width))
        hidden = torch.randn(rows, hidden_width, device=PLACE.device).bfloat16()
        cu_seqlens = torch.linspace(0, rows, 33, device=PLACE.device).long()
        weights = [torch.randn(columns, hidden_width, device=PLACE.device).bfloat16() for _ in range(2)]
        mass = torch.full((rows,), 0.25, device=PLACE.device)
        (shares, *_, cu_units), table = halting.find_units(mass, cu_seqlens, 1.0, "fire", total_units)
        return lambda: quantize.project(hidden, shares, table, cu_units, *weights, None, 4, total_units)

    return prepare


def _rows(width):
    def prepare():
        import torch

        from ztok_fast.ops.quantize import triton as quantize

        shape = PLACE.few(16384), PLACE.few(width)
        latents, grad_latents, from_codes = (torch.randn(shape, device=PLACE.device) for _ in range(3))
        scale = torch.rand(shape[0], device=PLACE.device)
        return lambda: quantize.unnormalise(latents, scale, grad_latents, from_codes)

    return prepare


def entries() -> Iterator[Entry]:
    """All keys of the tables."""
    for key, columns in (((64,), 64), ((ANY,), 128)):
        tiles = ((32, 32, 8, 2), (32, 32, 4, 2), (16, 32, 4, 2), (16, 64, 4, 2), (32, 64, 8, 2), (64, 32, 8, 2))
        candidates = tuple(Project(units, columns, step, warps, stages) for units, step, warps, stages in tiles)
        yield Entry("quantize", "PROJECT", key, candidates, _project(size_of(key, 96)))
    for bound in (128, 256, 512, 1024, 2048, ANY):
        width = size_of((bound,), 4096)
        most = max(1, 4096 // width)
        shapes = {(rows, warps) for rows in (most, 2 * most, max(1, most // 2)) for warps in (4, 8)}
        candidates = tuple(Rows(*shape) for shape in sorted(shapes))
        yield Entry("quantize", "ROWS", (bound,), candidates, _rows(width))
