"""Residual quantisation of latents."""

from ztok_fast.ops.quantize.contract import ResidualCodes, residual_quantize

__all__ = ["ResidualCodes", "residual_quantize"]
