"""Which blocks the halting kernels are launched with; `ztok_fast/ops/triton_tables.py` says how tables are read.

Chosen by what `python -m bench.tune --dry` reports (no spills, few registers: these kernels wait for memory) and by how
many programs a shape makes, not by timings: no GPU was at hand.
"""

from __future__ import annotations

from typing import NamedTuple

from ztok_fast.ops.triton_tables import ANY, Table, for_all, look_up


class Scan(NamedTuple):
    """Rows of a tile of a scan, tile sums that are added up at a time, and warps."""

    rows: int
    sums: int
    warps: int


class Offsets(NamedTuple):
    """Sequences that the one program of `offsets_kernel` takes at a time, and warps."""

    sequences: int
    warps: int


class Totals(NamedTuple):
    """Units of a program of `unit_totals_kernel`, rows of each that are added up at a time, and warps."""

    units: int
    rows: int
    warps: int


class Rows(NamedTuple):
    """Rows that are loaded together, columns of a step or tile, and warps."""

    rows: int
    columns: int
    warps: int


# (rows at most,) -> tile of `tile_sums_kernel`, `prefix_kernel`, `rows_kernel` and `unit_rows_kernel`. Up to 1024 rows
# are one tile, which saves a launch; up to 65,536 tiles of 1024 would be fewer than an H100 has multiprocessors.
SCAN: Table = for_all({(1024,): Scan(1024, 256, 4), (65536,): Scan(256, 256, 4), (ANY,): Scan(1024, 256, 4)})
# (rows at most,) -> tile of `tails_kernel` and `mass_gradient_kernel`
LATER: Table = for_all({(65536,): Scan(256, 256, 4), (ANY,): Scan(512, 256, 4)})
# (sequences at most,) -> block of `offsets_kernel`
OFFSETS: Table = for_all({(256,): Offsets(256, 4), (ANY,): Offsets(1024, 4)})
# (units at most,) -> block of `unit_totals_kernel`
TOTALS: Table = for_all({(ANY,): Totals(128, 4, 4)})
# (width at most, float64) -> tile of `unit_means_kernel`; four rows in flight hide some of the memory's latency
MEANS: Table = for_all(
    {
        (128, False): Rows(4, 128, 1),
        (128, True): Rows(4, 128, 1),
        (ANY, False): Rows(4, 512, 4),
        (ANY, True): Rows(4, 512, 4),
    }
)
# (width at most, float64) -> step of `row_gradients_kernel`; float64 with more than 16 columns spills, on sm_100 at 32
GRADIENTS: Table = for_all({(ANY, False): Rows(16, 128, 4), (ANY, True): Rows(16, 16, 4)})

# the interpreter goes through the segmented scan element by element
LATER_INTERPRETED = Scan(16, 256, 4)


def later_tile(rows: int, capability: tuple[int, int], interpreted: bool) -> Scan:
    """Tile of the backward scan."""
    return LATER_INTERPRETED if interpreted else look_up(LATER, capability, rows)
