"""Which tiles the kernels of the fused quantise are launched with; `ztok_fast/ops/triton_tables.py` says how tables are
read. The search has the tables of `ztok_fast/ops/nearest/triton_configs.py`.

Chosen by what `python -m bench.tune --dry` reports (no spills), not by timings: no GPU was at hand.
"""

from __future__ import annotations

from typing import NamedTuple

from ztok_fast.ops.triton_tables import ANY, Table, for_all


class Project(NamedTuple):
    """Units and most columns of a block of `project_units_kernel`, step of the hidden width, launch options."""

    units: int
    columns: int
    width: int
    warps: int
    stages: int


class Rows(NamedTuple):
    """Rows of a tile over the whole width, and warps."""

    rows: int
    warps: int


# (latent width at most,) -> block of `project_units_kernel`. A block waits for the rows of its units and wants to be
# small; columns that cover the latent are normalised in it.
PROJECT: Table = for_all({(64,): Project(32, 64, 32, 8, 2), (ANY,): Project(32, 128, 32, 8, 2)})
# (latent width at most,) -> tile of `normalise_kernel` and `unnormalise_kernel`: about 4096 elements
ROWS: Table = for_all(
    {
        (128,): Rows(32, 8),
        (256,): Rows(16, 8),
        (512,): Rows(8, 8),
        (1024,): Rows(4, 8),
        (2048,): Rows(2, 8),
        (ANY,): Rows(1, 8),
    }
)
