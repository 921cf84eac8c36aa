"""Residual quantisation of latents with straight-through gradients (VQ-VAE, van den Oord et al., arXiv:1711.00937;
residual levels and their random dropout as in SoundStream, Zeghidour et al., arXiv:2107.03312)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks, dispatch
from ztok_fast.ops.nearest.contract import check_codebook
from ztok_fast.ops.quantize import reference


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

    The gradient of `quantized` passes straight through to the latents, except in rows that use no level (they are 0
    and transmit nothing). A row with NaN or infinity gets code 0 at every used level and makes both losses NaN.

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
    return ResidualCodes(*_residual_quantize(latents, codebooks, levels))


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


@torch.library.custom_op("ztok::residual_quantize", mutates_args=())
def _residual_quantize(
    latents: Tensor, codebooks: Tensor, levels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.check_finite_values("residual_quantize", "codebooks", codebooks)
    check_level_values("residual_quantize", levels, codebooks.shape[0])
    return dispatch.call("residual_quantize", latents, codebooks, levels)


def fake_codes(latents: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors with the shapes and dtypes of `ResidualCodes`."""
    num_levels, size, _ = codebooks.shape
    dtype = checks.compute_dtype(latents, codebooks)
    return (
        latents.new_empty((latents.shape[0], num_levels), dtype=torch.int32),
        latents.new_empty(latents.shape),
        latents.new_empty((), dtype=dtype),
        latents.new_empty((), dtype=dtype),
        latents.new_empty((num_levels, size), dtype=torch.int64),
    )


@_residual_quantize.register_fake
def _(latents, codebooks, levels):
    return fake_codes(latents, codebooks)


def _save(ctx, inputs, output):
    latents, codebooks, _ = inputs
    ctx.save_for_backward(latents, codebooks, output[0])


def _backward(ctx, grad_codes, grad_quantized, grad_commitment, grad_codebook_loss, grad_usage):
    grads = reference.residual_quantize_backward(
        grad_quantized, grad_commitment, grad_codebook_loss, *ctx.saved_tensors
    )
    return *grads, None


_residual_quantize.register_autograd(_backward, setup_context=_save)
