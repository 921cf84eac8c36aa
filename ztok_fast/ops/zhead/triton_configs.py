"""Which tiles the kernels of the Z head are launched with; `ztok_fast/ops/triton_tables.py` says how tables are read.

Chosen by what `python -m bench.tune --dry` reports (no spills, registers for a second block), not by timings: no GPU
was at hand.
"""

from __future__ import annotations

from typing import NamedTuple

from ztok_fast.ops.triton_tables import ANY, Table, for_all


class Scan(NamedTuple):
    """Sequences x codes of a tile, step of the width, launch options of `scan_kernel`."""

    sequences: int
    codes: int
    width: int
    warps: int
    stages: int


class Select(NamedTuple):
    """Codes per step of the float64 search, step of the width, and warps of `select_kernel`."""

    codes: int
    width: int
    warps: int


# blocks that fill the device, and the most parts that one program merges at once
FULL_BLOCKS, MOST_PARTS = 256, 256

# (sequences at most, bytes of an element) -> tile of `scan_kernel`. The rows are read once per tile of sequences; on
# sm_100 a tile of 32 sequences in half precision spills.
SCAN: Table = for_all(
    {
        (16, 2): Scan(16, 128, 64, 8, 3),
        (16, 4): Scan(16, 64, 32, 8, 4),
        (ANY, 2): Scan(32, 128, 64, 8, 3),
        (ANY, 4): Scan(16, 64, 32, 8, 4),
    }
)
SCAN["sm_100"][ANY, 2] = Scan(16, 128, 64, 8, 3)
# (width at most,) -> step of `select_kernel`
SELECT: Table = for_all({(ANY,): Select(32, 64, 4)})
