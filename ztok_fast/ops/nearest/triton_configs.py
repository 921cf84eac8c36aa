"""Which tiles the nearest-code kernels are launched with; `ztok_fast/ops/triton_tables.py` says how tables are read.

Chosen by what `python -m bench.tune --dry` reports: no spills, then the largest tile (fewest bytes per product), then
registers and shared memory that leave room for a second block. Not by timings: no GPU was at hand.
"""

from __future__ import annotations

from typing import NamedTuple

from ztok_fast.ops.triton_tables import ANY, Table, find, for_all, look_up


class Scan(NamedTuple):
    """Rows x codes of a tile, step of the width, launch options of `scan_kernel`."""

    rows: int
    codes: int
    width: int
    warps: int
    stages: int


class Search(NamedTuple):
    """The same of `residual_search_kernel`, and steps of the width and of the codes of its float64 settlement."""

    rows: int
    codes: int
    width: int
    settle_width: int
    settle_codes: int
    warps: int
    stages: int


class Settle(NamedTuple):
    """Rows, step of the width, codes per step of the float64 search of one row, and warps of `settle_kernel`."""

    rows: int
    width: int
    codes: int
    warps: int


class Rows(NamedTuple):
    """Rows (or codes), step of the width, and warps."""

    rows: int
    width: int
    warps: int


# fewer blocks of rows than this leave multiprocessors idle: the codebook is split until there are about as many
FULL_BLOCKS = 128
MOST_PARTS = 32
# what the one program of `mean_error_kernel` adds up at a time
SUMS = 1024

# (width at most, row terms, code terms) -> tile of `residual_search_kernel` that covers the width. Where an
# architecture has no entry, rows take a tile of WIDE.
WHOLE: Table = {
    "sm_80": {
        (64, 1, 1): Search(64, 64, 64, 16, 64, 8, 2),
        (64, 2, 1): Search(64, 32, 64, 16, 64, 8, 2),
    },
    "sm_90": {
        (64, 1, 1): Search(64, 64, 64, 16, 64, 8, 2),
        (64, 2, 1): Search(64, 64, 64, 16, 64, 8, 2),
        (64, 2, 2): Search(64, 64, 64, 16, 64, 8, 2),
        (256, 1, 1): Search(64, 64, 256, 16, 64, 8, 2),
        (256, 2, 1): Search(64, 64, 256, 16, 64, 8, 2),
        (256, 2, 2): Search(64, 64, 256, 16, 64, 8, 2),
    },
    "sm_100": {
        (64, 1, 1): Search(64, 64, 64, 16, 64, 8, 2),
        (64, 2, 1): Search(64, 64, 64, 16, 64, 8, 2),
        (64, 2, 2): Search(64, 64, 64, 16, 64, 8, 2),
        (256, 2, 1): Search(64, 64, 256, 16, 64, 8, 2),
    },
}
# (width at most, row terms, code terms) -> tile of `residual_search_kernel` that is walked in steps of the width
WIDE: Table = {
    "sm_80": {
        (ANY, 1, 1): Search(128, 128, 32, 16, 64, 8, 3),
        (ANY, 2, 1): Search(128, 128, 32, 16, 64, 8, 3),
        (ANY, 2, 2): Search(128, 64, 32, 16, 64, 8, 3),
    },
    "sm_90": {
        (ANY, 1, 1): Search(128, 128, 64, 16, 64, 8, 3),
        (ANY, 2, 1): Search(128, 128, 32, 16, 64, 8, 3),
        (ANY, 2, 2): Search(128, 128, 32, 16, 64, 8, 3),
    },
    "sm_100": {
        (ANY, 1, 1): Search(128, 128, 32, 16, 64, 8, 3),
        (ANY, 2, 1): Search(128, 128, 64, 16, 64, 8, 3),
        (ANY, 2, 2): Search(128, 128, 32, 16, 64, 8, 3),
    },
}
# (rows at most, row terms, code terms) -> tile of `scan_kernel`. Few rows are bound by reading the codes: a low tile
# leaves room for more blocks, and so for more bytes on the way.
STEPS: Table = {
    "sm_80": {
        (64, 1, 1): Scan(64, 64, 32, 4, 3),
        (64, 2, 1): Scan(64, 64, 32, 4, 3),
        (64, 2, 2): Scan(64, 64, 32, 4, 3),
        (ANY, 1, 1): Scan(128, 128, 32, 8, 3),
        (ANY, 2, 1): Scan(128, 128, 32, 8, 3),
        (ANY, 2, 2): Scan(128, 128, 32, 8, 3),
    },
    "sm_90": {
        (64, 1, 1): Scan(64, 64, 32, 4, 3),
        (64, 2, 1): Scan(64, 64, 32, 4, 3),
        (64, 2, 2): Scan(64, 64, 32, 4, 3),
        (ANY, 1, 1): Scan(128, 256, 32, 8, 3),
        (ANY, 2, 1): Scan(128, 128, 64, 8, 3),
        (ANY, 2, 2): Scan(128, 128, 64, 8, 3),
    },
    "sm_100": {
        (64, 1, 1): Scan(64, 64, 32, 4, 3),
        (64, 2, 1): Scan(64, 64, 32, 4, 3),
        (64, 2, 2): Scan(64, 64, 32, 4, 3),
        (ANY, 1, 1): Scan(128, 128, 32, 8, 3),
        (ANY, 2, 1): Scan(128, 128, 64, 8, 3),
        (ANY, 2, 2): Scan(128, 128, 32, 8, 3),
    },
}
# (width at most,) -> tile of `settle_kernel`; `sum_codes_kernel` takes its rows, width and warps
SETTLE: Table = for_all({(64,): Settle(32, 64, 32, 8), (ANY,): Settle(16, 128, 32, 8)})
# (width at most,) -> tile of `prepare_codes_kernel`
PREPARE: Table = for_all({(ANY,): Rows(32, 64, 4)})
# (width at most,) -> tile of `cosine_parts_kernel`, `row_gradients_kernel` and the sums by code
GRADIENTS: Table = for_all({(ANY,): Rows(16, 64, 4)})


def whole_tile(width: int, row_terms: int, code_terms: int, capability: tuple[int, int]) -> Search | None:
    """Tile of `residual_search_kernel` that covers rows of this width; None if there is none."""
    return find(WHOLE, capability, width, row_terms, code_terms)


def wide_tile(width: int, row_terms: int, code_terms: int, capability: tuple[int, int]) -> Search:
    """Tile of `residual_search_kernel` that is walked in steps of the width."""
    return look_up(WIDE, capability, width, row_terms, code_terms)


def step_tile(rows: int, row_terms: int, code_terms: int, capability: tuple[int, int]) -> Scan:
    """Tile of `scan_kernel`."""
    return look_up(STEPS, capability, rows, row_terms, code_terms)
