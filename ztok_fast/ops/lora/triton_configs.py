"""Which tiles the LoRA kernels are launched with: a small table, no search at the user's first call.

Chosen from the resource reports of the ahead-of-time compilation (registers, shared memory, no spills) and from what
keeps the tensor cores fed on paper, not from timings: no GPU was at hand. Rows enter by a few steps, so that the number
of compiled variants does not grow with the batches that are seen.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Tile of rows x columns, step through the inner dimension, ranks per low-rank step, and launch options.

    `ranks` is for adapters that are taken as they are; ones that are split into two terms take half of it.
    """

    rows: int
    columns: int
    inner: int
    ranks: int
    warps: int
    stages: int


# row blocks that share the columns of the weight in L2
GROUP = 8

# (compute capability, float32, several adapters) -> ((at most so many rows, tile), ...). Several adapters need room for
# a second accumulator, hence the smaller tile.
_TILES: dict[tuple[int, bool, bool], tuple[tuple[float, Tile], ...]] = {
    (8, False, False): ((512, Tile(64, 128, 32, 32, 4, 4)), (float("inf"), Tile(128, 128, 32, 32, 8, 4))),
    (8, False, True): ((512, Tile(64, 64, 64, 32, 4, 3)), (float("inf"), Tile(128, 64, 32, 32, 8, 4))),
    (8, True, False): ((float("inf"), Tile(64, 64, 32, 16, 4, 3)),),
    (8, True, True): ((float("inf"), Tile(64, 64, 32, 16, 8, 3)),),
    (9, False, False): ((512, Tile(64, 128, 64, 32, 4, 4)), (float("inf"), Tile(128, 256, 64, 32, 8, 3))),
    (9, False, True): ((512, Tile(64, 128, 64, 32, 8, 4)), (float("inf"), Tile(128, 128, 64, 32, 8, 3))),
    (9, True, False): ((float("inf"), Tile(64, 64, 32, 32, 4, 3)),),
    (9, True, True): ((float("inf"), Tile(64, 64, 32, 32, 8, 3)),),
}


def linear_tile(rows: int, float32: bool, several: bool, capability: tuple[int, int]) -> Tile:
    """Tile of `lora_linear_kernel`; capabilities above 9 take the tiles of 9."""
    return next(tile for limit, tile in _TILES[min(capability[0], 9), float32, several] if rows <= limit)


def low_rank_step(tile: Tile, split: bool) -> int:
    """Most ranks per low-rank step."""
    return max(16, tile.ranks // 2) if split else tile.ranks


class Shrink(NamedTuple):
    """Tile of `shrink_kernel`."""

    rows: int
    inner: int
    warps: int
    stages: int


def shrink_tile(rows: int, exact: bool) -> Shrink:
    """The inner dimension is long and the ranks are few, so it takes many row blocks to occupy the device."""
    inner = 32 if exact else 64
    return Shrink(16, inner, 4, 4) if rows <= 4096 else Shrink(64, inner, 4, 3)


# most ranks of a program of `shrink_kernel` and `outer_kernel`
SHRINK_RANKS, OUTER_RANKS = 64, 64
# rows that are looked through at once for an adapter, rows of a step, columns, warps, stages
OUTER_CHUNK, OUTER_ROWS, OUTER_COLUMNS, OUTER_WARPS, OUTER_STAGES = 512, 32, 64, 4, 3


def outer_parts(programs: int, chunks: int, multiprocessors: int, most: int) -> int:
    """Parts that the rows are divided into: enough programs for the device, at most `most` partial sums."""
    return max(1, min(-(-2 * multiprocessors // programs), chunks, most))
