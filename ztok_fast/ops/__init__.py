"""Tensor operations of the codec. They know nothing of models.

Every op has one contract (`contract.py` of its family: public function, checks, registration), a plain PyTorch
`reference.py` that defines its result, and possibly faster backends. See `ztok_fast.ops.requirements` for what runs
where and `ztok_fast.ops.dispatch` for how a backend is chosen. The registered ops (`torch.ops.ztok`) and their backends
return differentiable outputs first, the public functions named tuples.
"""

from ztok_fast.ops.dispatch import BackendUnavailable, backend
from ztok_fast.ops.halting import HaltingUnits, halting_units, integrate_units
from ztok_fast.ops.lora import lora_linear
from ztok_fast.ops.nearest import Assignment, codebook_assign
from ztok_fast.ops.quantize import QuantizedUnits, ResidualCodes, quantize_ragged, residual_quantize
from ztok_fast.ops.ragged import (
    RaggedBatch,
    RaggedLayout,
    ragged_gather,
    ragged_layout,
    ragged_pack,
    ragged_scatter_add,
    ragged_unpack,
)
from ztok_fast.ops.zhead import Selection, z_select
from ztok_fast.ops.zhead.token_scores import TokenScores, token_scores

__all__ = [
    "Assignment",
    "BackendUnavailable",
    "HaltingUnits",
    "QuantizedUnits",
    "RaggedBatch",
    "RaggedLayout",
    "ResidualCodes",
    "Selection",
    "TokenScores",
    "backend",
    "codebook_assign",
    "halting_units",
    "integrate_units",
    "lora_linear",
    "quantize_ragged",
    "ragged_gather",
    "ragged_layout",
    "ragged_pack",
    "ragged_scatter_add",
    "ragged_unpack",
    "residual_quantize",
    "token_scores",
    "z_select",
]
