"""Candidates for the nearest-code and residual search."""

from __future__ import annotations

from collections.abc import Iterator

from bench.tune.entry import PLACE, Entry, size_of
from ztok_fast.ops.nearest.triton_configs import Rows, Scan, Search, Settle
from ztok_fast.ops.triton_tables import ANY

# (row terms, code terms)
TERMS = ((1, 1), (2, 1), (2, 2))


def _inputs(rows, size, width, terms):
    """Rows and one codebook whose dtypes make that many terms."""
    import torch

    rows, size, width = map(PLACE.few, (rows, size, width))
    row_type, code_type = (torch.bfloat16 if term == 1 else torch.float32 for term in terms)
    x = torch.randn(rows, width, device=PLACE.device).to(row_type)
    return x, torch.randn(1, size, width, device=PLACE.device).to(code_type)


def _search(rows, size, width, terms):
    def prepare():
        from ztok_fast.ops.nearest import triton as nearest

        x, book = _inputs(rows, size, width, terms)
        return lambda: nearest.search(x, book, "l2", None, False)

    return prepare


def _prepare_codes(width):
    def prepare():
        from ztok_fast.ops.nearest import triton as nearest

        x, book = _inputs(1, 65536, width, (2, 2))
        return lambda: nearest.prepare_codes(x, book, "l2", 1)

    return prepare


def _gradients(width):
    def prepare():
        import torch

        from ztok_fast.ops.nearest import triton_gradients as gradients

        x, book = _inputs(32768, 1024, width, (2, 2))
        codes = torch.randint(0, book.shape[1], (x.shape[0], 1), dtype=torch.int32, device=PLACE.device)
        weights = torch.randn(x.shape[0], 1, device=PLACE.device)
        return lambda: gradients.codebook_assign_backward(x, book, codes, weights, "l2")

    return prepare


def whole_candidates(width: int) -> tuple[Search, ...]:
    """Tiles that cover the width."""
    tiles = ((64, 64, 4), (64, 64, 8), (128, 64, 8), (128, 32, 8), (64, 32, 8), (32, 64, 4))
    return tuple(Search(rows, codes, width, 16, 64, warps, 2) for rows, codes, warps in tiles)


WIDE = tuple(
    Search(rows, codes, width, 16, 64, warps, stages)
    for rows, codes, width, warps, stages in (
        (128, 256, 32, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 3), (128, 128, 64, 8, 2), (128, 64, 32, 8, 3),
        (64, 128, 64, 8, 3), (64, 128, 32, 8, 3), (64, 128, 32, 4, 3),
    )
)  # fmt: skip
MANY_ROWS = tuple(
    Scan(*tile)
    for tile in (
        (128, 256, 64, 8, 3), (128, 256, 32, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 3), (128, 128, 64, 8, 2),
        (128, 128, 32, 8, 2), (64, 128, 64, 4, 3), (64, 128, 32, 4, 3),
    )
)  # fmt: skip
FEW_ROWS = tuple(
    Scan(*tile)
    for tile in (
        (64, 128, 64, 4, 3), (64, 128, 64, 8, 3), (64, 128, 32, 4, 3), (64, 64, 64, 4, 3), (64, 64, 64, 4, 4),
        (64, 64, 32, 4, 3), (16, 128, 64, 4, 3), (16, 64, 64, 4, 3),
    )
)  # fmt: skip


def entries() -> Iterator[Entry]:
    """All keys of the tables."""
    for terms in TERMS:
        for width in (64, 256):
            candidates = whole_candidates(width)
            yield Entry("nearest", "WHOLE", (width, *terms), candidates, _search(131072, 1024, width, terms))
        yield Entry("nearest", "WIDE", (ANY, *terms), WIDE, _search(16384, 8192, 1024, terms))
        yield Entry("nearest", "STEPS", (64, *terms), FEW_ROWS, _search(64, 65536, 1024, terms))
        yield Entry("nearest", "STEPS", (ANY, *terms), MANY_ROWS, _search(4096, 65536, 1024, terms))
    for key in ((64,), (ANY,)):
        width = size_of(key, 1024)
        tiles = [(16, 64, 32, 4), (16, 64, 64, 4), (16, 64, 16, 4), (8, 64, 32, 4), (16, 32, 32, 4), (16, 32, 16, 4)]
        tiles += [(16, 128, 32, 8), (32, 64, 32, 8), (16, 64, 32, 8)]
        # few codes, so that the settlement is a good part of it
        yield Entry("nearest", "SETTLE", key, tuple(Settle(*tile) for tile in tiles), _search(7168, 64, width, (2, 2)))
    blocks = (Rows(32, 64, 4), Rows(16, 64, 4), Rows(64, 64, 4), Rows(16, 128, 4), Rows(32, 32, 4), Rows(64, 64, 8))
    yield Entry("nearest", "PREPARE", (ANY,), blocks, _prepare_codes(1024))
    yield Entry("nearest", "GRADIENTS", (ANY,), blocks, _gradients(1024))
