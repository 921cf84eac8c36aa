"""Plain PyTorch residual quantiser: the definition that every other backend is tested against."""

import torch

from ztok_fast.ops.checks import compute_dtype
from ztok_fast.ops.nearest.reference import nearest_codes
from ztok_fast.ops.segments import segment_sum


def residual_quantize(latents, codebooks, levels):
    """See `ztok_fast.ops.quantize.contract.residual_quantize`; returns the fields of `ResidualCodes` as a tuple."""
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
    loss = (error.sum() / (_used_pairs(codes) * width)).to(dtype)
    return codes.int(), quantized.to(latents.dtype), loss, loss.clone(), usage


def _used_pairs(codes):
    """Number of (row, level) pairs that have a code, at least 1."""
    return (codes >= 0).sum().clamp(min=1)


def residual_quantize_backward(grad_quantized, grad_commitment, grad_codebook_loss, latents, codebooks, codes):
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
    factor = 2 / (_used_pairs(codes) * width)
    later = torch.zeros_like(residual)
    grad_books = []
    for level in reversed(range(num_levels)):
        later = later + errors[level]
        index = torch.where(used[:, level], codes[:, level], size)
        grad_books.append(segment_sum(-factor * grad_codebook_loss.to(dtype) * later, index, size))
    straight_through = torch.where(used.any(1, keepdim=True), grad_quantized.to(dtype), 0)
    grad_latents = straight_through + factor * grad_commitment.to(dtype) * later
    return grad_latents.to(latents.dtype), torch.stack(grad_books[::-1]).to(codebooks.dtype)
