"""Residual quantisation of latents, alone and fused with halting."""

from ztok_fast.ops.quantize.quantize_ragged import QuantizedUnits, quantize_ragged
from ztok_fast.ops.quantize.residual_quantize import ResidualCodes, residual_quantize

__all__ = ["QuantizedUnits", "ResidualCodes", "quantize_ragged", "residual_quantize"]
