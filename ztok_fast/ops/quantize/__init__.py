"""Residual quantisation of latents, alone and fused with halting."""
