"""Triton backend of `residual_quantize`: the residual search of the nearest-code kernels, with usage counts, the sum of
the codes and the losses; and its backward pass."""

from __future__ import annotations

from ztok_fast.ops.nearest import triton as nearest
from ztok_fast.ops.nearest.triton_gradients import row_gradients, sum_by_code


def residual_quantize(latents, codebooks, levels):
    """See `ztok_fast.ops.quantize.reference.residual_quantize`."""
    found = nearest.search(latents, codebooks, "l2", levels, quantize=True)
    return found.quantized, found.commitment, found.codebook_loss, found.codes, found.usage


def residual_quantize_backward(latents, codebooks, codes, grad_quantized, grad_commitment, grad_codebook_loss):
    """Gradients of the latents [M, d] and the codebooks [L, V, d], the codes held fixed.

    Both losses are sums of squared errors of the levels, divided by pairs x width: the gradient of `codebook_assign`
    with equal weights, of which the commitment takes the latents' share and the codebook loss the codes'.
    """
    pairs = (codes >= 0).sum().clamp(min=1)
    factor = 2 / (pairs * latents.shape[1]).float()
    grad_latents, to_codes = row_gradients(
        latents, codebooks, codes, None, "l2", grad_quantized, factor * grad_commitment.float()
    )
    return grad_latents, sum_by_code(to_codes, codes, codebooks, factor * grad_codebook_loss.float())
