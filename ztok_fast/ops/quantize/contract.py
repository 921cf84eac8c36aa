"""`quantize_ragged`: residual quantisation fused with halting and projection."""

from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks, dispatch
from ztok_fast.ops.halting import contract as halting
from ztok_fast.ops.nearest.codebook_assign import check_codebook
from ztok_fast.ops.quantize.residual_quantize import check_level_values, check_levels
from ztok_fast.ops.quantize.residual_quantize import fake_codes


class QuantizedUnits(NamedTuple):
    """Result of `quantize_ragged` for K units of width d and L codebooks of V entries.

    Attributes:
        codes, quantized, commitment, codebook_loss, usage: as in `ResidualCodes`, a row per unit.
        latents: float32 (float64 if a float input other than the mass is) [K, d], what was quantised; differentiable.
        units: the `HaltingUnits`; their weights are differentiable in the mass.
    """

    codes: Tensor
    quantized: Tensor
    latents: Tensor
    commitment: Tensor
    codebook_loss: Tensor
    usage: Tensor
    units: halting.HaltingUnits


def quantize_ragged(
    hidden: Tensor,
    mass: Tensor,
    cu_seqlens: Tensor,
    end_weight: Tensor,
    mean_weight: Tensor,
    codebooks: Tensor,
    levels: Tensor | None = None,
    threshold: float = 1.0,
    mode: str = "fire",
    total_units: int | None = None,
) -> QuantizedUnits:
    """From packed hidden states to packed codes: halting, projection, residual search, in one op.

    The latent of a unit is end_weight @ h + mean_weight @ m, divided by its root mean square, with h the hidden state
    of the row that ends the unit and m the weighted mean of the unit's rows (`integrate_units`). Halting is that of
    `halting_units`, quantisation that of `residual_quantize`; so are the gradients. Differentiable once.

    For K units O(T D + K D d + K L V d) time, so that rows which end no unit cost their part of a mean and no more;
    extra memory O(T + K (D + d) + L V d) at most. Backward O(T D + K D d + K L d + L V d).

    Args:
        hidden: floating point [T, D].
        mass: floating point [T], halting mass, see `halting_units`.
        cu_seqlens: int32 or int64 [B + 1].
        end_weight, mean_weight: floating point [d, D].
        codebooks: floating point [L, V, d], finite and not empty.
        levels: int32 or int64 [B], residual levels used per sequence, in [0, L]; None uses all.
        threshold, mode: see `halting_units`.
        total_units: rows of the result, at least the number of units; T is always enough. Rows past the last unit
            have codes -1 and zeros elsewhere, and count in no loss and no usage. None means exactly the number of
            units, which is read from the device: that synchronises, and cannot be inside a compiled full graph.

    Returns:
        `QuantizedUnits`, computed in float32 (float64 if a float input other than the mass is float64).

    Raises:
        ValueError: as `halting_units` and `residual_quantize`; widths that do not match; too few `total_units`.
    """
    op = "quantize_ragged"
    checks.check_tensor(op, "hidden", hidden, "[T, D]")
    checks.check_tensor(op, "mass", mass, "[T]")
    checks.check_same_device(op, "mass", mass, "hidden", hidden)
    checks.check_size(op, "mass", mass, 0, hidden.shape[0], "rows of hidden")
    checks.check_cu_seqlens(op, "cu_seqlens", cu_seqlens, "hidden", hidden)
    checks.check_tensor(op, "end_weight", end_weight, "[d, D]")
    check_codebook(op, "codebooks", codebooks, "[L, V, d]", "end_weight", end_weight.T)
    for argument, weight in (("end_weight", end_weight), ("mean_weight", mean_weight)):
        checks.check_tensor(op, argument, weight, "[d, D]")
        checks.check_same_device(op, argument, weight, "hidden", hidden)
        checks.check_size(op, argument, weight, 0, codebooks.shape[2], "the width of codebooks")
        checks.check_size(op, argument, weight, 1, hidden.shape[1], "the width of hidden")
    if levels is not None:
        check_levels(op, levels, "[B]", cu_seqlens.shape[0] - 1, "sequences", "hidden", hidden)
    checks.check_positive(op, "threshold", threshold)
    checks.check_choice(op, "mode", mode, halting.MODES)
    if total_units is None:
        total_units = int(halting.halting_units(mass.detach(), cu_seqlens, threshold, mode).cu_units[-1])
    checks.check_count(op, "total_units", total_units)
    arguments = hidden, mass, cu_seqlens, end_weight, mean_weight, codebooks, levels
    outputs = dispatch.run(_registered_ragged, _ragged_kernel, *arguments, float(threshold), mode, total_units)
    quantized, latents, commitment, codebook_loss, weights, codes, usage, _, ends, unit, counts, cu_units = outputs
    units = halting.HaltingUnits(ends, unit, weights, counts, cu_units)
    return QuantizedUnits(codes, quantized, latents, commitment, codebook_loss, usage, units)


def _ragged_kernel(
    hidden: Tensor,
    mass: Tensor,
    cu_seqlens: Tensor,
    end_weight: Tensor,
    mean_weight: Tensor,
    codebooks: Tensor,
    levels: Tensor | None,
    threshold: float,
    mode: str,
    total_units: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything in `QuantizedUnits`, and before `ends` the factors [K] that normalised the latents."""
    op = "quantize_ragged"

    def check() -> None:
        checks.check_cu_seqlens_values(op, "cu_seqlens", cu_seqlens, mass.shape[0])
        halting.check_mass_values(op, mass, threshold, mode)
        checks.check_finite_values(op, "codebooks", codebooks)
        check_level_values(op, levels, codebooks.shape[0])

    arguments = hidden, mass, cu_seqlens, end_weight, mean_weight, codebooks, levels
    outputs = dispatch.call_contiguous(op, *arguments, threshold, mode, total_units, check=check)
    halting.check_total_units(op, outputs[-1], total_units)
    return outputs


_quantize_ragged = torch.library.custom_op("ztok::quantize_ragged", _ragged_kernel, mutates_args=())
_registered_ragged = torch.ops.ztok.quantize_ragged.default


@_quantize_ragged.register_fake
def _(hidden, mass, cu_seqlens, end_weight, mean_weight, codebooks, levels, threshold, mode, total_units):
    dtype = checks.compute_dtype(hidden, end_weight, mean_weight, codebooks)
    latents = hidden.new_empty((total_units, codebooks.shape[2]), dtype=dtype)
    quantized, commitment, codebook_loss, codes, usage = fake_codes(latents, codebooks)
    weights, *units = halting.fake_units(mass, cu_seqlens)
    scale = latents.new_empty(total_units)
    return quantized, latents, commitment, codebook_loss, weights, codes, usage, scale, *units


@torch.library.custom_op("ztok::quantize_ragged_backward", mutates_args=())
def _quantize_ragged_backward(
    hidden: Tensor,
    mass: Tensor,
    cu_seqlens: Tensor,
    end_weight: Tensor,
    mean_weight: Tensor,
    codebooks: Tensor,
    latents: Tensor,
    weights: Tensor,
    codes: Tensor,
    scale: Tensor,
    ends: Tensor,
    unit: Tensor,
    cu_units: Tensor,
    grad_quantized: Tensor,
    grad_latents: Tensor,
    grad_commitment: Tensor,
    grad_codebook_loss: Tensor,
    grad_weights: Tensor,
    threshold: float,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden [T, D], mass [T], both projections [d, D] and the codebooks [L, V, d]; codes held fixed."""
    return dispatch.call_contiguous(
        "quantize_ragged_backward",
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
    )


@_quantize_ragged_backward.register_fake
def _(hidden, mass, cu_seqlens, end_weight, mean_weight, codebooks, *_):
    return tuple(t.new_empty(t.shape) for t in (hidden, mass, end_weight, mean_weight, codebooks))


def _save_ragged(ctx, inputs, output):
    hidden, mass, cu_seqlens, end_weight, mean_weight, codebooks, _, ctx.threshold, ctx.mode, _ = inputs
    _, latents, _, _, weights, codes, _, scale, ends, unit, _, cu_units = output
    arguments = hidden, mass, cu_seqlens, end_weight, mean_weight, codebooks
    ctx.save_for_backward(*arguments, latents, weights, codes, scale, ends, unit, cu_units)


def _backward_ragged(ctx, *grads):
    # the first five outputs are the differentiable ones
    hidden, mass, end_weight, mean_weight, codebooks = _quantize_ragged_backward(
        *ctx.saved_tensors, *grads[:5], ctx.threshold, ctx.mode
    )
    return hidden, mass, None, end_weight, mean_weight, codebooks, None, None, None, None


_quantize_ragged.register_autograd(_backward_ragged, setup_context=_save_ragged)
