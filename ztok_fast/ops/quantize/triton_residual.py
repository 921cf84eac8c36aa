"""Triton backend of `residual_quantize`: the residual search of the nearest-code kernels, with usage counts, the sum of
the codes and the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops.nearest import triton as nearest


def mean_error(distances: Tensor, codes: Tensor, width: int) -> Tensor:
    """Mean of squared distances [M, L] over the pairs that have a code, and over the width; float32, deterministic.

    Distances are 0 where there is no code and NaN in rows that are not finite.
    """
    pairs = (codes >= 0).sum().clamp(min=1)
    return (distances.sum(dtype=torch.float64) / (pairs * width)).float()


def residual_quantize(
    latents: Tensor, codebooks: Tensor, levels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `ztok_fast.ops.quantize.contract.residual_quantize`.

    Returns:
        quantized, commitment, codebook_loss, codes, usage.
    """
    found = nearest.search(latents, codebooks, "l2", levels, quantize=True)
    loss = mean_error(found.distances, found.codes, latents.shape[1])
    return found.quantized, loss, loss.clone(), found.codes, found.usage
