"""Nearest-code search over one codebook or several residual levels (vector quantisation as in VQ-VAE, van den Oord et
al., arXiv:1711.00937; residual levels as in SoundStream, Zeghidour et al., arXiv:2107.03312)."""

from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks, dispatch

METRICS = ("l2", "cosine", "dot")


class Assignment(NamedTuple):
    """Result of `codebook_assign`.

    Attributes:
        codes: int32 [M], or [M, L] for a codebook with levels.
        distances: float32 (float64 if an input is float64), same shape. Differentiable in both inputs.
    """

    codes: Tensor
    distances: Tensor


def codebook_assign(x: Tensor, codebook: Tensor, metric: str = "l2") -> Assignment:
    """The nearest code of each row.

    Distances are |x - c|^2 for "l2", 1 - cos(x, c) for "cosine" (1 where either is zero) and -x.c for "dot"; the least
    wins, the lowest index among equals. "Exact" means: the answer of float64 arithmetic, except where the two codes
    are there within rounding of each other.

    With L levels the search is residual: level l searches what the levels before it left over,
    x - c_0 - ... - c_{l-1}. The chosen rows are subtracted as they stand whatever the metric (for "cosine" too, which
    compares directions only), so that their sum is always the approximation of x. The residual is kept in float32
    (float64 if an input is float64) and rounded to it after every level.

    A row that holds NaN or infinity gets code 0 and distance NaN, at every level. The distances are differentiable once;
    their gradient takes the codes as given.

    O(M L V d) time; extra memory O(M d + L V d) at most, never of size M V. Backward O(M L d + L V d).

    Args:
        x: floating point [M, d]; M may be 0.
        codebook: floating point [V, d] or [L, V, d], finite and not empty.
        metric: "l2", "cosine" or "dot".

    Returns:
        `Assignment`.

    Raises:
        ValueError: bad rank, dtype, device, width or metric; a codebook that is empty or not finite.
    """
    checks.check_tensor("codebook_assign", "x", x, "[M, d]")
    check_codebook("codebook_assign", "codebook", codebook, "[V, d] or [L, V, d]", "x", x)
    checks.check_choice("codebook_assign", "metric", metric, METRICS)
    if codebook.ndim == 3:
        distances, codes = dispatch.run(_registered, _kernel, x, codebook, metric)
        return Assignment(codes, distances)
    distances, codes = dispatch.run(_registered, _kernel, x, codebook[None], metric)
    return Assignment(codes[:, 0], distances[:, 0])


def check_codebook(op: str, argument: str, codebook: object, layout: str, main_argument: str, main: Tensor) -> None:
    """A codebook that is not empty, as wide as `main` and on its device."""
    checks.check_tensor(op, argument, codebook, layout)
    checks.check_same_device(op, argument, codebook, main_argument, main)
    checks.check_not_empty(op, argument, codebook)
    checks.check_size(op, argument, codebook, -1, main.shape[-1], f"the width of {main_argument}")


def _kernel(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    def check() -> None:
        checks.check_finite_values("codebook_assign", "codebook", codebook)

    return dispatch.call_contiguous("codebook_assign", x, codebook, metric, check=check)


_codebook_assign = torch.library.custom_op("ztok::codebook_assign", _kernel, mutates_args=())
_registered = torch.ops.ztok.codebook_assign.default


@_codebook_assign.register_fake
def _(x, codebook, metric):
    shape = (x.shape[0], codebook.shape[0])
    return x.new_empty(shape, dtype=checks.compute_dtype(x, codebook)), x.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("ztok::codebook_assign_backward", mutates_args=())
def _codebook_assign_backward(
    x: Tensor, codebook: Tensor, codes: Tensor, grad_distances: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` [M, d] and `codebook` [L, V, d] from that of the distances [M, L], the codes held fixed."""
    return dispatch.call_contiguous("codebook_assign_backward", x, codebook, codes, grad_distances, metric)


@_codebook_assign_backward.register_fake
def _(x, codebook, codes, grad_distances, metric):
    return x.new_empty(x.shape), codebook.new_empty(codebook.shape)


def _save(ctx, inputs, output):
    x, codebook, ctx.metric = inputs
    ctx.save_for_backward(x, codebook, output[1])


def _backward(ctx, grad_distances, grad_codes):
    return *_codebook_assign_backward(*ctx.saved_tensors, grad_distances, ctx.metric), None


_codebook_assign.register_autograd(_backward, setup_context=_save)
