"""Tensor operations of the codec. They know nothing of models.

Every op has one contract (`contract.py` of its family: public function, checks, registration), a plain PyTorch
`reference.py` that defines its result, and possibly faster backends. See `ztok_fast.ops.requirements` for what runs
where and `ztok_fast.ops.dispatch` for how a backend is chosen.
"""

from ztok_fast.ops.dispatch import BackendUnavailable, backend
from ztok_fast.ops.halting import HaltingUnits, halting_units, integrate_units
from ztok_fast.ops.nearest import Assignment, codebook_assign
from ztok_fast.ops.quantize import ResidualCodes, residual_quantize

__all__ = [
    "Assignment",
    "BackendUnavailable",
    "HaltingUnits",
    "ResidualCodes",
    "backend",
    "codebook_assign",
    "halting_units",
    "integrate_units",
    "residual_quantize",
]
