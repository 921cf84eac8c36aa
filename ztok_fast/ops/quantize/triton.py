"""Triton backend of `residual_quantize` and `quantize_ragged`: host side. Nothing waits for the device.

`residual_quantize` is the residual search of `ops.nearest.triton` with usage counts, the sum of the codes and losses.

`quantize_ragged`, forward: the table of units, `project_units_kernel`, and the residual search. The search is a launch
of its own, not the tail of the projection: a projection block is small, because it waits for memory, and a search block
large, because it is bound by the tensor cores, and for few units the search is split over the codebook. Rows that end
no unit are read only for the mean they have a share in; blocks of units that do not exist do nothing.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from ztok_fast.ops.halting import triton as halting
from ztok_fast.ops.nearest import triton as nearest
from ztok_fast.ops.nearest.triton_gradients import row_gradients, sum_by_code
from ztok_fast.ops.quantize import triton_kernels as kernels
from ztok_fast.ops.triton_launch import Tiles

# a block waits for the rows of its units and wants to be small; columns that cover the latent are normalised in it
_PROJECTIONS = (32, 128, 32, 8, 2), (16, 128, 32, 8, 2), (32, 128, 32, 4, 2)
PROJECT = Tiles(kernels.project_units_kernel, "BM BN BK", *_PROJECTIONS, key=("HIDDEN", "D"))


@functools.cache
def _rows_tiles(kernel, width: int) -> Tiles:
    """A few whole rows of this width, about 4096 numbers."""
    columns = triton.next_power_of_2(width)
    return Tiles(kernel, "BM BD", (max(1, min(32, 4096 // columns)), columns, 8))


def project(hidden, weights, table, cu_units, end_weight, mean_weight, levels, num_levels, total_units):
    """Normalised latents float32 [K, d], the factors that normalised them, and the residual levels of units."""
    width, sequences = end_weight.shape[0], cu_units.shape[0] - 1
    latents = hidden.new_empty((total_units, width), dtype=torch.float32)
    scale = hidden.new_empty(total_units, dtype=torch.float32)
    unit_levels = hidden.new_empty(total_units, dtype=torch.int32)
    if total_units == 0:
        return latents, scale, unit_levels
    tiles = PROJECT.at_most(BN=max(16, triton.next_power_of_2(width)))
    whole = tiles.BN >= width
    tiles[lambda size: (triton.cdiv(total_units, size["BM"]), triton.cdiv(width, size["BN"]))](
        hidden, weights, *table, cu_units, end_weight, mean_weight, levels, latents, scale, unit_levels,
        sequences, num_levels, total_units,
        HIDDEN=hidden.shape[1], D=width, LEVELS=levels is not None, WHOLE=whole,
    )  # fmt: skip
    if not whole:
        tiles = _rows_tiles(kernels.normalise_kernel, width)
        tiles[(triton.cdiv(total_units, tiles.BM),)](latents, scale, total_units, D=width)
    return latents, scale, unit_levels


def unnormalise(latents: Tensor, scale: Tensor, grad_latents: Tensor, from_codes: Tensor) -> Tensor:
    """Gradient of what was normalised to `latents` [K, d], from both of their gradients."""
    total_units, width = latents.shape
    grad = torch.empty_like(latents)
    if total_units:
        tiles = _rows_tiles(kernels.unnormalise_kernel, width)
        tiles[(triton.cdiv(total_units, tiles.BM),)](
            latents, scale, grad_latents, from_codes, grad, total_units, D=width
        )
    return grad


def quantize_ragged(
    hidden, weights, unit, ends, cu_units, end_weight, mean_weight, codebooks, levels, total_units
):  # fmt: skip
    """See `ztok_fast.ops.quantize.reference.quantize_ragged`."""
    table = halting.unit_rows(unit, ends, cu_units, total_units)
    latents, scale, unit_levels = project(
        hidden, weights, table, cu_units, end_weight, mean_weight, levels, codebooks.shape[0], total_units
    )
    found = nearest.search(latents, codebooks, "l2", unit_levels, quantize=True)
    return found.quantized, latents, found.commitment, found.codebook_loss, scale, found.codes, found.usage


def quantize_ragged_backward(
    hidden, weights, unit, ends, cu_units, end_weight, mean_weight, codebooks, latents, scale, codes,
    grad_quantized, grad_latents, grad_commitment, grad_codebook_loss,
):  # fmt: skip
    """See `ztok_fast.ops.quantize.reference.quantize_ragged_backward`.

    The means are made again and the end rows gathered; four matrix products over the units; one pass over the rows.
    """
    total_units = latents.shape[0]
    from_codes, grad_codebooks = residual_quantize_backward(
        latents, codebooks, codes, grad_quantized, grad_commitment, grad_codebook_loss
    )
    grad = unnormalise(latents, scale, grad_latents, from_codes)
    table = halting.unit_rows(unit, ends, cu_units, total_units)
    means = hidden.new_empty((total_units, hidden.shape[1]), dtype=torch.float32)
    halting.unit_means(hidden, weights, table, cu_units, means)
    end_rows = _end_rows(hidden, table, cu_units, total_units)
    grad_hidden, grad_weights = halting.row_gradients(
        hidden, weights, unit, ends, cu_units, table, means,
        grad @ mean_weight.float(), grad @ end_weight.float(),
    )  # fmt: skip
    grad_end_weight = (grad.T @ end_rows).to(end_weight.dtype)
    return grad_hidden, grad_weights, grad_end_weight, (grad.T @ means).to(mean_weight.dtype), grad_codebooks


def _end_rows(hidden: Tensor, table, cu_units: Tensor, total_units: int) -> Tensor:
    """float32 [K, D]: the row that ends each unit, zeros past the last."""
    if hidden.shape[0] == 0:
        return hidden.new_zeros((total_units, hidden.shape[1]), dtype=torch.float32)
    exists = (torch.arange(total_units, device=hidden.device) < cu_units[-1]) & (table.end_rows > 0)
    rows = torch.where(exists, table.end_rows - 1, 0)
    return torch.where(exists[:, None], hidden.index_select(0, rows), 0).float()


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
