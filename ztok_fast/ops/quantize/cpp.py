"""Residual quantisation of the compiled CPU library; the requirements table loads it before it chooses this."""

import torch


def quantize_ragged(hidden, mass, cu_seqlens, end_weight, mean_weight, codebooks, levels, threshold, mode, total_units):
    """See `ztok_fast.ops.quantize.reference.quantize_ragged`; csrc/cpu/quantize_ragged.cpp.

    One pass over the mass, one over the rows that have a share in a unit, a block of units at a time; then the search of
    `residual_quantize` over the K units. Extra memory: 8 D bytes for each of at most 512 units, 24 bytes per unit.
    """
    return torch.ops.ztok.quantize_ragged_native(
        hidden, mass, cu_seqlens, end_weight, mean_weight, codebooks, levels, threshold, mode == "stop", total_units
    )


def quantize_ragged_backward(
    hidden, mass, cu_seqlens, end_weight, mean_weight, codebooks, latents, weights, codes, scale, ends, unit, cu_units,
    grad_quantized, grad_latents, grad_commitment, grad_codebook_loss, grad_weights, threshold, mode,
):  # fmt: skip
    """See `ztok_fast.ops.quantize.reference.quantize_ragged_backward`.

    The rows that end units and the means are gathered again; four matrix products of K units; one pass over the rows.
    """
    from_codes, grad_codebooks = torch.ops.ztok.residual_quantize_backward(
        latents, codebooks, codes, grad_quantized, grad_commitment, grad_codebook_loss
    )
    grad = grad_latents + from_codes
    grad = scale[:, None] * (grad - latents * (grad * latents).mean(1, keepdim=True))
    end_rows, means = torch.ops.ztok.unit_inputs_native(hidden, weights, unit, cu_units, len(codes))
    grad_hidden, integrated = torch.ops.ztok.integrate_units_backward_native(
        hidden, weights, unit, cu_units, means, grad @ mean_weight.float(), grad @ end_weight.float()
    )
    grad_mass = torch.ops.ztok.halting_units_backward_native(
        mass, cu_seqlens, grad_weights + integrated, threshold, mode == "stop"
    )
    grad_end_weight = (grad.T @ end_rows).to(end_weight.dtype)
    return grad_hidden, grad_mass, grad_end_weight, (grad.T @ means).to(mean_weight.dtype), grad_codebooks
