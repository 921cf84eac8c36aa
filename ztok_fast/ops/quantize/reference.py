"""Plain PyTorch residual quantiser: the definition that every other backend is tested against."""

import torch

from ztok_fast.ops.checks import compute_dtype
from ztok_fast.ops.halting import reference as halting
from ztok_fast.ops.nearest.reference import residual_codes, take_codes
from ztok_fast.ops.op import vjp
from ztok_fast.ops.segments import sequence_of
from ztok_fast.ops.straight_through import straight_through

# added to the mean square of a latent before it is normalised, so that a latent of zeros stays zero
RMS_EPS = 1e-6


def residual_quantize(latents, codebooks, levels):
    """See `ztok_fast.ops.residual_quantize`.

    Returns:
        quantized, commitment, codebook_loss, codes, usage.
    """
    with torch.no_grad():
        codes = residual_codes(latents, codebooks, "l2", levels)
    usage = torch.stack([code[code >= 0].bincount(minlength=codebooks.shape[1]) for code in codes.unbind(1)])
    return *quantized_and_losses(latents, codebooks, codes), codes, usage


def quantized_and_losses(latents, codebooks, codes):
    """Quantised rows and both losses of given codes, differentiable.

    With e_l = z - q_{<=l} and N used pairs, both losses are sum_l |e_l|^2 / (N d); the commitment sees z alone, the
    codebook loss the codes alone, and code l is part of every e_l' with l' >= l.
    """
    dtype = compute_dtype(latents, codebooks)
    to_latents = latents.to(dtype)
    to_books = to_latents.detach()
    quantized = torch.zeros_like(to_books)
    commitment = codebook_loss = quantized.new_zeros((), dtype=torch.float64)
    for book, code in zip(codebooks.to(dtype), codes.unbind(1)):
        chosen, used = take_codes(book, code), (code >= 0)[:, None]
        to_latents, to_books = to_latents - chosen.detach(), to_books - chosen
        quantized = quantized + chosen.detach()
        commitment = commitment + torch.where(used, to_latents.double(), 0).square().sum()
        codebook_loss = codebook_loss + torch.where(used, to_books.double(), 0).square().sum()
    count = (codes >= 0).sum().clamp(min=1) * latents.shape[1]
    # no square of a finite residual overflows float64: infinity is that of a row
    losses = [e / count for e in (commitment, codebook_loss)]
    losses = [straight_through(torch.where(torch.isinf(e), torch.nan, e), e).to(dtype) for e in losses]
    quantized = quantized.to(latents.dtype)
    through = torch.where((codes >= 0).any(1, keepdim=True), latents, 0)
    return straight_through(quantized, through), *losses


def residual_quantize_backward(latents, codebooks, codes, grad_quantized, grad_commitment, grad_codebook_loss):
    """Gradients of the latents [M, d] and the codebooks [L, V, d], the codes held fixed."""
    grads = grad_quantized, grad_commitment, grad_codebook_loss
    return tuple(vjp(lambda z, books: quantized_and_losses(z, books, codes), (latents, codebooks), grads))


def _end_rows(hidden, unit, ends, total_units):
    """The row of `hidden` that ends each unit [total_units, D]; 0 for units that do not exist."""
    if hidden.shape[0] == 0:
        return hidden.new_zeros((total_units, hidden.shape[1]))
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    slot = torch.where(ends, unit.long(), total_units).clamp(max=total_units)
    row_of = torch.full((total_units + 1,), -1, dtype=torch.int64, device=hidden.device)
    row_of = row_of.scatter(0, slot, rows)[:total_units]
    return torch.where(row_of[:, None] >= 0, hidden[row_of.clamp(min=0)], 0)


def _unit_levels(levels, cu_units, num_levels, total_units):
    """Residual levels of each unit from those of its sequence; 0 past the last unit."""
    if levels is None:
        levels = cu_units.new_full((cu_units.shape[0] - 1,), num_levels)
    # positions past the last unit are in sequence B, which gets 0 levels
    levels = torch.cat([levels, levels.new_zeros(1)])
    return levels[sequence_of(cu_units, torch.arange(total_units, device=cu_units.device))]


def _latents(hidden, weights, unit, ends, cu_units, end_weight, mean_weight, codebooks, total_units):
    """Normalised latents [total_units, d] and the factors that normalised them [total_units]; differentiable."""
    dtype = compute_dtype(hidden, end_weight, mean_weight, codebooks)
    hidden = hidden.to(dtype)
    end_rows = _end_rows(hidden, unit, ends, total_units)
    means = halting.integrate_units(hidden, weights, unit, ends, cu_units, total_units)
    latents = end_rows @ end_weight.to(dtype).T + means @ mean_weight.to(dtype).T
    scale = torch.rsqrt(latents.square().mean(1) + RMS_EPS)
    return latents * scale[:, None], scale


def quantize_ragged(
    hidden, weights, unit, ends, cu_units, end_weight, mean_weight, codebooks, levels, total_units
):  # fmt: skip
    """See `ztok_fast.ops.quantize_ragged`; the units are given.

    Returns:
        quantized, latents, commitment, codebook_loss, scale, codes, usage.
    """
    given = hidden, weights, unit, ends, cu_units, end_weight, mean_weight, codebooks
    latents, scale = _latents(*given, total_units)
    unit_levels = _unit_levels(levels, cu_units, codebooks.shape[0], total_units)
    quantized, commitment, codebook_loss, codes, usage = residual_quantize(latents, codebooks, unit_levels)
    return quantized, latents, commitment, codebook_loss, scale, codes, usage


def quantize_ragged_backward(
    hidden, weights, unit, ends, cu_units, end_weight, mean_weight, codebooks, latents, scale, codes,
    grad_quantized, grad_latents, grad_commitment, grad_codebook_loss,
):  # fmt: skip
    """Gradients of hidden [T, D], weights [T, 2], both projections [d, D] and the codebooks [L, V, d]; codes fixed."""

    def of_codes(hidden, weights, end_weight, mean_weight, codebooks):
        given = hidden, weights, unit, ends, cu_units, end_weight, mean_weight, codebooks
        latents, _ = _latents(*given, codes.shape[0])
        quantized, *losses = quantized_and_losses(latents, codebooks, codes)
        return quantized, latents, *losses

    grads = grad_quantized, grad_latents, grad_commitment, grad_codebook_loss
    return tuple(vjp(of_codes, (hidden, weights, end_weight, mean_weight, codebooks), grads))
