"""Which tiles the LoRA kernels are launched with; `ztok_fast/ops/triton_tables.py` says how tables are read.

Chosen by what `python -m bench.tune --dry` reports (no spills, registers, shared memory) and by what keeps the tensor
cores fed on paper, not by timings: no GPU was at hand. Rows enter by a few steps, so that the number of compiled
variants does not grow with the batches that are seen.
"""

from __future__ import annotations

from typing import NamedTuple

from ztok_fast.ops.triton_tables import ANY, Table, for_all


class Tile(NamedTuple):
    """Tile of rows x columns of `lora_linear_kernel`, step through the inner dimension, ranks per low-rank step, and
    launch options.

    `ranks` is for adapters that are taken as they are; ones that are split into two terms take half of it.
    """

    rows: int
    columns: int
    inner: int
    ranks: int
    warps: int
    stages: int


class Shrink(NamedTuple):
    """Rows and most ranks of a program of `shrink_kernel`, step through the inner dimension, launch options."""

    rows: int
    ranks: int
    inner: int
    warps: int
    stages: int


class Outer(NamedTuple):
    """Most ranks and columns of a program of `outer_kernel`, rows of a step, rows that are looked through at once for
    an adapter, launch options."""

    ranks: int
    columns: int
    rows: int
    chunk: int
    warps: int
    stages: int


# row blocks that share the columns of the weight in L2
GROUP = 8
# rows of a program of `row_adapters_kernel`
ADAPTER_ROWS = 256

# (rows at most, float32, several adapters) -> tile. Several adapters need room for a second accumulator, hence the
# smaller tile.
LINEAR: Table = {
    "sm_80": {
        (512, False, False): Tile(64, 128, 32, 32, 4, 4),
        (512, False, True): Tile(64, 64, 64, 32, 4, 3),
        (ANY, False, False): Tile(128, 128, 32, 32, 8, 4),
        (ANY, False, True): Tile(128, 64, 32, 32, 8, 4),
        (ANY, True, False): Tile(64, 64, 32, 16, 4, 3),
        (ANY, True, True): Tile(64, 64, 32, 16, 8, 3),
    },
    **{
        name: {
            (512, False, False): Tile(64, 128, 64, 32, 4, 4),
            (512, False, True): Tile(64, 128, 64, 32, 8, 4),
            (ANY, False, False): Tile(128, 256, 64, 32, 8, 3),
            (ANY, False, True): Tile(128, 128, 64, 32, 8, 3),
            (ANY, True, False): Tile(64, 64, 32, 32, 4, 3),
            (ANY, True, True): Tile(64, 64, 32, 32, 8, 3),
        }
        for name in ("sm_90", "sm_100")
    },
}
# (rows at most, exact products) -> tile. The inner dimension is long and the ranks are few, so it takes many row blocks
# to occupy the device.
SHRINK: Table = for_all(
    {
        (4096, False): Shrink(16, 64, 64, 4, 4),
        (4096, True): Shrink(16, 64, 32, 4, 4),
        (ANY, False): Shrink(64, 64, 64, 4, 3),
        (ANY, True): Shrink(64, 64, 32, 4, 3),
    }
)
# (columns at most, exact products) -> tile
OUTER: Table = for_all({(ANY, False): Outer(64, 64, 32, 512, 4, 3), (ANY, True): Outer(64, 64, 32, 512, 4, 3)})


def low_rank_step(tile: Tile, split: bool) -> int:
    """Most ranks per low-rank step."""
    return max(16, tile.ranks // 2) if split else tile.ranks


def outer_parts(programs: int, chunks: int, multiprocessors: int, most: int) -> int:
    """Parts that the rows are divided into: enough programs for the device, at most `most` partial sums."""
    return max(1, min(-(-2 * multiprocessors // programs), chunks, most))
