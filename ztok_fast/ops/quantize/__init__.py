"""Residual quantisation of latents, alone and fused with halting."""

from ztok_fast.ops.quantize.contract import QuantizedUnits, ResidualCodes, quantize_ragged, residual_quantize

__all__ = ["QuantizedUnits", "ResidualCodes", "quantize_ragged", "residual_quantize"]
