"""Residual quantisation of latents, alone and fused with halting, with straight-through gradients.

After VQ-VAE (van den Oord et al., arXiv:1711.00937); residual levels and their random dropout as in SoundStream
(Zeghidour et al., arXiv:2107.03312).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks, dispatch
from ztok_fast.ops.halting import contract as halting
from ztok_fast.ops.nearest.contract import check_codebook


class ResidualCodes(NamedTuple):
    """Result of `residual_quantize` for M latents of width d and L codebooks of V entries.

    Attributes:
        codes: int32 [M, L], -1 where a level is dropped.
        quantized: [M, d] in the dtype of the latents, the sum of the chosen code vectors.
        commitment: scalar, gradient to the latents only.
        codebook_loss: scalar of the same value, gradient to the codebooks only.
        usage: int64 [L, V], how many rows chose each code; has no gradient.
    """

    codes: Tensor
    quantized: Tensor
    commitment: Tensor
    codebook_loss: Tensor
    usage: Tensor


def residual_quantize(latents: Tensor, codebooks: Tensor, levels: Tensor | None = None) -> ResidualCodes:
    """Quantise latents with L residual levels, each searched by squared distance.

    Codes are those of `codebook_assign(latents, codebooks, "l2")` as far as `levels` goes. `commitment` and
    `codebook_loss` are the mean over rows and used levels l of |z - q_{<=l}|^2 / d, with q_{<=l} the sum of the first
    l code vectors; float32 (float64 if an input is float64), 0 when no level of any row is used.

    Differentiable once. The gradient of `quantized` passes straight through to the latents, except in rows that use no
    level (they are 0 and transmit nothing). A row with NaN or infinity gets code 0 at every used level and makes both
    losses NaN.

    O(M L V d) time; extra memory O(M d + L V d) at most, never of size M V. Backward O(M L d + L V d).

    Args:
        latents: floating point [M, d]; M may be 0.
        codebooks: floating point [L, V, d], finite and not empty.
        levels: int32 or int64 [M], residual levels used per row, in [0, L]; None uses all.

    Returns:
        `ResidualCodes`.

    Raises:
        ValueError: bad rank, dtype, device or width; codebooks that are empty or not finite; levels out of range.
    """
    checks.check_tensor("residual_quantize", "latents", latents, "[M, d]")
    check_codebook("residual_quantize", "codebooks", codebooks, "[L, V, d]", "latents", latents)
    if levels is not None:
        check_levels("residual_quantize", levels, "[M]", latents.shape[0], "rows of latents", "latents", latents)
    quantized, commitment, codebook_loss, codes, usage = dispatch.run(_registered, _kernel, latents, codebooks, levels)
    return ResidualCodes(codes, quantized, commitment, codebook_loss, usage)


def check_levels(op, levels, layout, size, meaning, main_argument, main) -> None:
    """Integer levels, one per row or sequence, on the device of `main`."""
    checks.check_tensor(op, "levels", levels, layout, checks.INDICES)
    checks.check_same_device(op, "levels", levels, main_argument, main)
    checks.check_size(op, "levels", levels, 0, size, meaning)


def check_level_values(op: str, levels: Tensor | None, num_levels: int) -> None:
    """Levels in [0, L]."""
    if levels is None or not checks.value_checks(levels) or levels.numel() == 0:
        return
    low, high = int(levels.min()), int(levels.max())
    if low < 0 or high > num_levels:
        checks.fail(op, "levels", f"in [0, {num_levels}] (the number of codebooks)", low if low < 0 else high)


def _kernel(latents: Tensor, codebooks: Tensor, levels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def check() -> None:
        checks.check_finite_values("residual_quantize", "codebooks", codebooks)
        check_level_values("residual_quantize", levels, codebooks.shape[0])

    return dispatch.call_contiguous("residual_quantize", latents, codebooks, levels, check=check)


_residual_quantize = torch.library.custom_op("ztok::residual_quantize", _kernel, mutates_args=())
_registered = torch.ops.ztok.residual_quantize.default


def fake_codes(latents: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors with the shapes and dtypes of quantized, commitment, codebook_loss, codes and usage."""
    num_levels, size, _ = codebooks.shape
    dtype = checks.compute_dtype(latents, codebooks)
    return (
        latents.new_empty(latents.shape),
        latents.new_empty((), dtype=dtype),
        latents.new_empty((), dtype=dtype),
        latents.new_empty((latents.shape[0], num_levels), dtype=torch.int32),
        latents.new_empty((num_levels, size), dtype=torch.int64),
    )


@_residual_quantize.register_fake
def _(latents, codebooks, levels):
    return fake_codes(latents, codebooks)


@torch.library.custom_op("ztok::residual_quantize_backward", mutates_args=())
def _residual_quantize_backward(
    latents: Tensor,
    codebooks: Tensor,
    codes: Tensor,
    grad_quantized: Tensor,
    grad_commitment: Tensor,
    grad_codebook_loss: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the latents [M, d] and the codebooks [L, V, d], the codes held fixed."""
    return dispatch.call_contiguous(
        "residual_quantize_backward", latents, codebooks, codes, grad_quantized, grad_commitment, grad_codebook_loss
    )


@_residual_quantize_backward.register_fake
def _(latents, codebooks, codes, grad_quantized, grad_commitment, grad_codebook_loss):
    return latents.new_empty(latents.shape), codebooks.new_empty(codebooks.shape)


def _save(ctx, inputs, output):
    latents, codebooks, _ = inputs
    ctx.save_for_backward(latents, codebooks, output[3])


def _backward(ctx, grad_quantized, grad_commitment, grad_codebook_loss, grad_codes, grad_usage):
    grads = _residual_quantize_backward(*ctx.saved_tensors, grad_quantized, grad_commitment, grad_codebook_loss)
    return *grads, None


_residual_quantize.register_autograd(_backward, setup_context=_save)


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
