"""Plain PyTorch residual quantiser: the definition that every other backend is tested against."""

import torch

from ztok_fast.ops.checks import compute_dtype
from ztok_fast.ops.halting import reference as halting
from ztok_fast.ops.nearest.reference import nearest_codes
from ztok_fast.ops.segments import segment_sum, sequence_of

# added to the mean square of a latent before it is normalised, so that a latent of zeros stays zero
RMS_EPS = 1e-6


def residual_quantize(latents, codebooks, levels):
    """See `ztok_fast.ops.quantize.contract.residual_quantize`.

    Returns:
        quantized, commitment, codebook_loss, codes, usage.
    """
    dtype = compute_dtype(latents, codebooks)
    rows, width = latents.shape
    num_levels, size, _ = codebooks.shape
    residual, books = latents.to(dtype), codebooks.to(dtype)
    quantized = torch.zeros_like(residual)
    error = torch.zeros(rows, dtype=torch.float64, device=latents.device)
    codes = torch.full((rows, num_levels), -1, dtype=torch.int64, device=latents.device)
    usage = torch.zeros((num_levels, size), dtype=torch.int64, device=latents.device)
    for level in range(num_levels):
        used = torch.ones_like(error, dtype=torch.bool) if levels is None else levels > level
        code, _ = nearest_codes(residual, books[level], "l2")
        chosen = torch.where(used[:, None], books[level][code], 0)
        residual = residual - chosen
        quantized = quantized + chosen
        error += torch.where(used, residual.double().square().sum(1), 0)
        codes[:, level] = torch.where(used, code, -1)
        usage[level].scatter_add_(0, code, used.long())
    total = error.sum()
    # no square of a finite residual overflows float64: infinity is that of a row
    total = torch.where(total.isfinite(), total, torch.nan)
    loss = (total / (_used_pairs(codes) * width)).to(dtype)
    return quantized.to(latents.dtype), loss, loss.clone(), codes.int(), usage


def _used_pairs(codes):
    """Number of (row, level) pairs that have a code, at least 1."""
    return (codes >= 0).sum().clamp(min=1)


def residual_quantize_backward(latents, codebooks, codes, grad_quantized, grad_commitment, grad_codebook_loss):
    """Gradients of the latents [M, d] and the codebooks [L, V, d], the codes held fixed.

    With e_l = z - q_{<=l} and N used pairs, both losses are sum_l |e_l|^2 / (N d); the commitment sees z alone, the
    codebook loss sees the codes alone, and code l is part of every e_l' with l' >= l.
    """
    dtype = compute_dtype(latents, codebooks)
    num_levels, size, width = codebooks.shape
    residual, books = latents.to(dtype), codebooks.to(dtype)
    used = codes >= 0
    errors = []
    for level in range(num_levels):
        has_code = used[:, level : level + 1]
        residual = residual - torch.where(has_code, books[level][codes[:, level].clamp(min=0).long()], 0)
        errors.append(torch.where(has_code, residual, 0))
    factor = 2 / (_used_pairs(codes).to(dtype) * width)
    later = torch.zeros_like(residual)
    grad_books = []
    for level in reversed(range(num_levels)):
        later = later + errors[level]
        index = torch.where(used[:, level], codes[:, level], size)
        grad_books.append(segment_sum(-factor * grad_codebook_loss.to(dtype) * later, index, size))
    straight_through = torch.where(used.any(1, keepdim=True), grad_quantized.to(dtype), 0)
    grad_latents = straight_through + factor * grad_commitment.to(dtype) * later
    return grad_latents.to(latents.dtype), torch.stack(grad_books[::-1]).to(codebooks.dtype)


def _end_rows(hidden, unit, ends, total_units):
    """The row of `hidden` that ends each unit [total_units, D]; 0 for units that do not exist."""
    if hidden.shape[0] == 0:
        return hidden.new_zeros((total_units, hidden.shape[1]))
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    slot = torch.where(ends, unit.long(), total_units).clamp(max=total_units)
    row_of = torch.full((total_units + 1,), -1, dtype=torch.int64, device=hidden.device)
    row_of = row_of.scatter(0, slot, rows)[:total_units]
    return torch.where(row_of[:, None] >= 0, hidden[row_of.clamp(min=0)], 0)


def _end_rows_and_means(hidden, weights, unit, ends, cu_units, total_units):
    """What the latent of each unit is made from, both [total_units, D]."""
    end_rows = _end_rows(hidden, unit, ends, total_units)
    return end_rows, halting.integrate_units(hidden, weights, unit, ends, cu_units, total_units)


def _unit_levels(levels, cu_units, num_levels, total_units):
    """Residual levels of each unit from those of its sequence; 0 past the last unit."""
    if levels is None:
        levels = cu_units.new_full((cu_units.shape[0] - 1,), num_levels)
    # positions past the last unit are in sequence B, which gets 0 levels
    levels = torch.cat([levels, levels.new_zeros(1)])
    return levels[sequence_of(cu_units, torch.arange(total_units, device=cu_units.device))]


def quantize_ragged(hidden, mass, cu_seqlens, end_weight, mean_weight, codebooks, levels, threshold, mode, total_units):
    """See `ztok_fast.ops.quantize.contract.quantize_ragged`.

    Returns:
        quantized, latents, commitment, codebook_loss, weights, codes, usage, scale, ends, unit, counts, cu_units.
    """
    dtype = compute_dtype(hidden, end_weight, mean_weight, codebooks)
    weights, ends, unit, counts, cu_units = halting.halting_units(mass, cu_seqlens, threshold, mode)
    end_rows, means = _end_rows_and_means(hidden.to(dtype), weights, unit, ends, cu_units, total_units)
    latents = end_rows @ end_weight.to(dtype).T + means @ mean_weight.to(dtype).T
    scale = torch.rsqrt(latents.square().mean(1) + RMS_EPS)
    latents = latents * scale[:, None]
    unit_levels = _unit_levels(levels, cu_units, codebooks.shape[0], total_units)
    quantized, commitment, codebook_loss, codes, usage = residual_quantize(latents, codebooks, unit_levels)
    losses = commitment, codebook_loss
    return quantized, latents, *losses, weights, codes, usage, scale, ends, unit, counts, cu_units


def quantize_ragged_backward(
    hidden,
    mass,
    cu_seqlens,
    end_weight,
    mean_weight,
    codebooks,
    latents,
    weights,
    codes,
    scale,
    ends,
    unit,
    cu_units,
    grad_quantized,
    grad_latents,
    grad_commitment,
    grad_codebook_loss,
    grad_weights,
    threshold,
    mode,
):
    """Gradients of hidden [T, D], mass [T], both projections [d, D] and the codebooks [L, V, d]."""
    dtype = compute_dtype(hidden, end_weight, mean_weight, codebooks)
    total_units = codes.shape[0]
    end_rows, means = _end_rows_and_means(hidden.to(dtype), weights, unit, ends, cu_units, total_units)
    from_codes, grad_codebooks = residual_quantize_backward(
        latents, codebooks, codes, grad_quantized, grad_commitment, grad_codebook_loss
    )
    grad = grad_latents.to(dtype) + from_codes
    grad = scale[:, None] * (grad - latents * (grad * latents).mean(1, keepdim=True))
    grad_end_rows, grad_means = grad @ end_weight.to(dtype), grad @ mean_weight.to(dtype)
    from_means, integrated = halting.integrate_units_backward(
        hidden.to(dtype), weights, unit, ends, cu_units, means, grad_means
    )
    # a row of zeros at the end for rows that end no unit
    grad_end_rows = torch.cat([grad_end_rows, grad_end_rows.new_zeros(1, hidden.shape[1])])
    grad_hidden = from_means + grad_end_rows[torch.where(ends, unit.long(), total_units).clamp(max=total_units)]
    grad_mass = halting.halting_units_backward(mass, cu_seqlens, grad_weights + integrated, threshold, mode)
    return (
        grad_hidden.to(hidden.dtype),
        grad_mass,
        (grad.T @ end_rows).to(end_weight.dtype),
        (grad.T @ means).to(mean_weight.dtype),
        grad_codebooks,
    )
