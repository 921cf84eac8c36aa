"""Triton backend of `residual_quantize`: the residual search of the nearest-code kernels, with usage counts, the sum of
the codes and the losses; and its backward pass."""

from __future__ import annotations

from torch import Tensor

from ztok_fast.ops.nearest import triton as nearest
from ztok_fast.ops.nearest.triton_gradients import row_gradients, sum_by_code


def residual_quantize(
    latents: Tensor, codebooks: Tensor, levels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `ztok_fast.ops.residual_quantize`.

    Returns:
        quantized, commitment, codebook_loss, codes, usage.
    """
    found = nearest.search(latents, codebooks, "l2", levels, quantize=True)
    assert found.quantized is not None and found.commitment is not None  # `quantize` makes them
    assert found.codebook_loss is not None and found.usage is not None
    return found.quantized, found.commitment, found.codebook_loss, found.codes, found.usage


def residual_quantize_backward(
    latents: Tensor,
    codebooks: Tensor,
    codes: Tensor,
    grad_quantized: Tensor,
    grad_commitment: Tensor,
    grad_codebook_loss: Tensor,
) -> tuple[Tensor, Tensor]:
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
