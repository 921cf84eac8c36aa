"""Tensor operations of the codec. They know nothing of models.

Every op is declared once (`ztok_fast.ops.op.Op`), in a file of its family: public function, checks, backends and
specification. A plain PyTorch `reference.py` defines its result. `ztok_fast.ops.backends` says how a backend is chosen.
The registered ops (`torch.ops.ztok`) return differentiable outputs first, the public functions named tuples.
"""

from ztok_fast.ops.backends import BackendUnavailable, backend
from ztok_fast.ops.entropy.decode_symbols import DecodedSymbols, decode_symbols
from ztok_fast.ops.entropy.decode_tokens import DecodedTokens, decode_tokens
from ztok_fast.ops.entropy.range_encode import Streams, range_decoder, range_encode
from ztok_fast.ops.entropy.symbol_intervals import symbol_intervals
from ztok_fast.ops.entropy.token_intervals import Intervals, token_intervals
from ztok_fast.ops.halting.halting_units import HaltingUnits, halting_units
from ztok_fast.ops.halting.integrate_units import integrate_units
from ztok_fast.ops.int8.fold_lora import fold_lora
from ztok_fast.ops.int8.int8_linear import int8_linear
from ztok_fast.ops.int8.int8_pack import Int8Panels, int8_pack
from ztok_fast.ops.int8.ordered_linear import ordered_linear
from ztok_fast.ops.int8.ordered_pack import ordered_pack
from ztok_fast.ops.lora.lora_linear import lora_linear
from ztok_fast.ops.nearest.codebook_assign import Assignment, codebook_assign
from ztok_fast.ops.quantize.quantize_ragged import QuantizedUnits, quantize_ragged
from ztok_fast.ops.quantize.residual_quantize import ResidualCodes, residual_quantize
from ztok_fast.ops.ragged.ragged_gather import RaggedBatch, ragged_gather
from ztok_fast.ops.ragged.ragged_layout import RaggedLayout, ragged_layout
from ztok_fast.ops.ragged.ragged_pack import ragged_pack, ragged_unpack
from ztok_fast.ops.ragged.ragged_scatter_add import ragged_scatter_add
from ztok_fast.ops.triton_launch import autotune
from ztok_fast.ops.zhead.token_scores import TokenScores, token_scores
from ztok_fast.ops.zhead.z_select import Selection, z_select

__all__ = [
    "Assignment",
    "BackendUnavailable",
    "DecodedSymbols",
    "DecodedTokens",
    "HaltingUnits",
    "Int8Panels",
    "Intervals",
    "QuantizedUnits",
    "RaggedBatch",
    "RaggedLayout",
    "ResidualCodes",
    "Selection",
    "Streams",
    "TokenScores",
    "autotune",
    "backend",
    "codebook_assign",
    "decode_symbols",
    "decode_tokens",
    "fold_lora",
    "halting_units",
    "int8_linear",
    "int8_pack",
    "integrate_units",
    "lora_linear",
    "ordered_linear",
    "ordered_pack",
    "quantize_ragged",
    "ragged_gather",
    "ragged_layout",
    "ragged_pack",
    "ragged_scatter_add",
    "ragged_unpack",
    "range_decoder",
    "range_encode",
    "residual_quantize",
    "symbol_intervals",
    "token_intervals",
    "token_scores",
    "z_select",
]
