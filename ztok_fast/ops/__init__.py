"""Tensor operations of the codec. They know nothing of models.

Every op is declared once (`ztok_fast.ops.op.Op`), in a file of its family: public function, checks, backends and
specification. A plain PyTorch `reference.py` defines its result. `ztok_fast.ops.backends` says how a backend is chosen.
The registered ops (`torch.ops.ztok`) return differentiable outputs first, the public functions named tuples.
"""

from ztok_fast.ops.backends import BackendUnavailable, backend
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
from ztok_fast.ops.triton_launch import autotune
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
    "autotune",
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
