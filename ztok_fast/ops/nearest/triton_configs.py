"""Which tiles the nearest-code kernels are launched with: a small table, no search at the user's first call."""

from __future__ import annotations

from typing import NamedTuple


# said at every launch: the default differs between releases of Triton
FUSION = {"enable_fp_fusion": True}


class Tile(NamedTuple):
    """Rows x codes x width of a tile, and launch options."""

    rows: int
    codes: int
    width: int
    warps: int
    stages: int


# rows and width of a step of `settle_kernel`, codes per step of its float64 search of one row, warps
SETTLE_ROWS, SETTLE_WIDTH, SETTLE_CODES, SETTLE_WARPS = 16, 128, 32, 8
# width and codes of such steps inside `residual_search_kernel`
SETTLE_WIDTH_INSIDE, SETTLE_CODES_INSIDE = 16, 64
# fewer blocks of rows than this leave multiprocessors idle: the codebook is split until there are about as many
FULL_BLOCKS = 128
MOST_PARTS = 32

# Chosen by what `python -m bench.tune_triton --dry` reports (registers, shared memory, no spills), not by timings: no
# GPU was at hand. Architecture -> (width at most, row terms, code terms) -> tile of `residual_search_kernel`. Rows
# wider than an entry, or of an architecture without one, take a tile of WIDE.
WHOLE: dict[str, dict[tuple[int, int, int], Tile]] = {
    "sm_80": {
        (64, 1, 1): Tile(64, 64, 64, 8, 2),
        (64, 2, 1): Tile(64, 32, 64, 8, 2),
    },
    "sm_90": {
        (64, 1, 1): Tile(64, 64, 64, 8, 2),
        (64, 2, 1): Tile(64, 64, 64, 8, 2),
        (64, 2, 2): Tile(64, 64, 64, 8, 2),
        (256, 1, 1): Tile(64, 64, 256, 8, 2),
        (256, 2, 1): Tile(64, 64, 256, 8, 2),
        (256, 2, 2): Tile(64, 64, 256, 8, 2),
    },
    "sm_100": {
        (64, 1, 1): Tile(64, 64, 64, 8, 2),
        (64, 2, 1): Tile(64, 64, 64, 8, 2),
        (64, 2, 2): Tile(64, 64, 64, 8, 2),
        (256, 2, 1): Tile(64, 64, 256, 8, 2),
    },
}
# (row terms, code terms) -> tile of `residual_search_kernel` for rows without an entry in WHOLE
WIDE: dict[str, dict[tuple[int, int], Tile]] = {
    "sm_80": {
        (1, 1): Tile(128, 128, 32, 8, 3),
        (2, 1): Tile(128, 128, 32, 8, 3),
        (2, 2): Tile(128, 64, 32, 8, 3),
    },
    "sm_90": {
        (1, 1): Tile(128, 128, 64, 8, 3),
        (2, 1): Tile(128, 128, 32, 8, 3),
        (2, 2): Tile(128, 128, 32, 8, 3),
    },
    "sm_100": {
        (1, 1): Tile(128, 128, 32, 8, 3),
        (2, 1): Tile(128, 128, 64, 8, 3),
        (2, 2): Tile(128, 128, 32, 8, 3),
    },
}
# (row terms, code terms) -> tile of `scan_kernel`
STEPS: dict[str, dict[tuple[int, int], Tile]] = {
    "sm_80": {
        (1, 1): Tile(128, 128, 32, 8, 3),
        (2, 1): Tile(128, 128, 32, 8, 3),
        (2, 2): Tile(128, 128, 32, 8, 3),
    },
    "sm_90": {
        (1, 1): Tile(128, 256, 32, 8, 3),
        (2, 1): Tile(128, 128, 64, 8, 3),
        (2, 2): Tile(128, 128, 64, 8, 3),
    },
    "sm_100": {
        (1, 1): Tile(128, 128, 32, 8, 3),
        (2, 1): Tile(128, 128, 64, 8, 3),
        (2, 2): Tile(128, 128, 32, 8, 3),
    },
}


def architecture(capability: tuple[int, int]) -> str:
    """The key of the tables for a compute capability; (0, 0), the interpreter, takes those of sm_90."""
    major = capability[0] or 9
    return "sm_80" if major < 9 else "sm_90" if major < 10 else "sm_100"


def whole_tile(width: int, row_terms: int, code_terms: int, capability: tuple[int, int]) -> Tile | None:
    """Tile of `residual_search_kernel` for rows of this width; None if there is none."""
    table = WHOLE[architecture(capability)]
    fits = sorted(key for key in table if key[0] >= width and key[1:] == (row_terms, code_terms))
    return table[fits[0]] if fits else None


def step_tile(row_terms: int, code_terms: int, capability: tuple[int, int]) -> Tile:
    """Tile of `scan_kernel`."""
    return STEPS[architecture(capability)][row_terms, code_terms]


def wide_tile(row_terms: int, code_terms: int, capability: tuple[int, int]) -> Tile:
    """Tile of `residual_search_kernel` for rows of any width."""
    return WIDE[architecture(capability)][row_terms, code_terms]
