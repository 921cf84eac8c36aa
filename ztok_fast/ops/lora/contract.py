"""Public function `lora_linear`: checks, registration, autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ztok_fast.ops import checks, dispatch
from ztok_fast.ops.requirements import FLOATS

OP = "lora_linear"
# dtype of x -> those that A and B may have, for the commonest kinds of call
_ADAPTER_DTYPES = {
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}


def _check_values(x: Tensor, num_adapters: int, adapters: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        checks.check_cu_seqlens_values(OP, "cu_seqlens", cu_seqlens, x.shape[0])
    if adapters is None or adapters.numel() == 0 or not checks.value_checks(adapters):
        return
    low, high = int(adapters.min()), int(adapters.max())
    if low < -1 or high >= num_adapters:
        expected = f"in [-1, {num_adapters}) (-1 = none, else an adapter)"
        checks.fail(OP, "adapters", expected, low if low < -1 else high)


def _kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: Tensor,
    adapters: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    _check_values(x, A.shape[0], adapters, cu_seqlens)
    return dispatch.call(OP, x, weight, bias, A, B, scaling, adapters, cu_seqlens)


_lora_linear = torch.library.custom_op("ztok::lora_linear", _kernel, mutates_args=())


@_lora_linear.register_fake
def _(x, weight, bias, A, B, scaling, adapters, cu_seqlens):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("ztok::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: Tensor,
    adapters: Tensor | None,
    cu_seqlens: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias, A, B); an empty tensor [0] where `needs` (in that order) is False."""
    return dispatch.call("lora_linear_backward", grad, x, weight, A, B, scaling, adapters, cu_seqlens, list(needs))


@_lora_linear_backward.register_fake
def _(grad, x, weight, A, B, scaling, adapters, cu_seqlens, needs):
    bias_shape = (weight.shape[0],)
    shapes = (x.shape, weight.shape, bias_shape, A.shape, B.shape)
    dtypes = (x.dtype, weight.dtype, weight.dtype, A.dtype, B.dtype)
    return tuple(
        grad.new_empty(shape, dtype=dtype) if needed else grad.new_empty(0)
        for shape, dtype, needed in zip(shapes, dtypes, needs)
    )


def _context(ctx, inputs, output):
    x, weight, bias, A, B, scaling, adapters, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, A, B, scaling, adapters, cu_seqlens)


def _backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:5])  # x, weight, bias, A, B
    x, weight, A, B, scaling, adapters, cu_seqlens = ctx.saved_tensors
    grads = _lora_linear_backward(grad.contiguous(), x, weight, A, B, scaling, adapters, cu_seqlens, needs)
    return (*(d if needed else None for d, needed in zip(grads, needs)), None, None, None)


_lora_linear.register_autograd(_backward, setup_context=_context)
_registered = torch.ops.ztok.lora_linear.default


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: Tensor,
    adapters: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Linear layer with low-rank adapters: y = x Wᵀ + bias + s (x Aᵀ) Bᵀ, every row under its own adapter.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    Args:
        x: [M, in], float16, bfloat16, float32 or float64.
        weight: [out, in], dtype of `x`.
        bias: [out], dtype of `x`, or None.
        A: [n, r, in], dtype of `x` or float32: the n adapters' down projections.
        B: [n, out, r], dtype of `A`: their up projections.
        scaling: float32 (float64 for float64 `x`) [n], constant: usually alpha / r.
        adapters: the adapter of each row, int32 [M] with values in [-1, n), -1 for the base layer alone; with
            `cu_seqlens` that of each sequence, int32 [B]; None for adapter 0 everywhere, which needs n = 1.
        cu_seqlens: int32 or int64 [B + 1], only with `adapters`.

    Returns:
        [M, out], dtype of `x`. The low-rank products are accumulated in fp32 (float64 for float64) and rounded once,
        when they are added to x Wᵀ + bias. A row does not depend on the adapters that it does not use, NaN in them
        included.

        Differentiable once in `x`, `A`, `B`, and in `weight` and `bias` where they require a gradient; the gradients
        have the dtypes of the arguments. Nothing of the size of `weight` is made besides its own gradient.

        O(M in out + M r (in + out)) time for any number of adapters in compiled code, n times the low-rank part in the
        reference; O(M r) extra memory, in half precision on the CPU O(M in).

        Under `torch.autocast` x, weight and bias are cast to the autocast dtype first, as a linear layer does.

    Raises:
        ValueError: wrong rank, dtype, device or size, `adapters` missing with n > 1, `scaling` that requires a
            gradient; under the value checks (`ztok_fast.ops.checks`) also an adapter out of range and `cu_seqlens`
            that do not add up to M.
    """
    if not _is_valid(x, weight, bias, A, B, scaling, adapters, cu_seqlens):
        x, weight, bias = _check(x, weight, bias, A, B, scaling, adapters, cu_seqlens)
    return dispatch.run(_registered, _kernel, x, weight, bias, A, B, scaling, adapters, cu_seqlens)


def _is_valid(x, weight, bias, A, B, scaling, adapters, cu_seqlens) -> bool:
    """Whether the commonest kind of call passes all checks: an eighth of the time of `_check`, which explains a no.

    Commonest: under no autocast, the adapter of each row given by `adapters` alone or not at all.
    """
    try:
        device, dtype = x.device, x.dtype
        num_rows, width = x.shape
        num_adapters, rank, _ = A.shape
        out = weight.shape[0]
        return (
            dtype in _ADAPTER_DTYPES
            and num_adapters * rank * width > 0
            and weight.shape == (out, width)
            and A.shape == (num_adapters, rank, width)
            and B.shape == (num_adapters, out, rank)
            and scaling.shape == (num_adapters,)
            and weight.dtype == dtype
            and A.dtype in _ADAPTER_DTYPES[dtype]
            and B.dtype == A.dtype
            and scaling.dtype == torch.float32
            and device == weight.device == A.device == B.device == scaling.device
            and (bias is None or bias.shape == (out,) and bias.dtype == dtype and bias.device == device)
            and cu_seqlens is None
            and (
                num_adapters == 1
                if adapters is None
                else adapters.shape == (num_rows,) and adapters.dtype == torch.int32 and adapters.device == device
            )
            and not scaling.requires_grad
            and not torch.is_autocast_enabled(device.type)
        )
    except (AttributeError, ValueError):  # not a tensor, or another rank
        return False


def _check(x, weight, bias, A, B, scaling, adapters, cu_seqlens) -> tuple[Tensor, Tensor, Tensor | None]:
    """All checks; x, weight and bias as autocast wants them."""
    checks.check_tensor(OP, "x", x, "[M, in]")
    checks.check_tensor(OP, "weight", weight, "[out, in]")
    if bias is not None:
        checks.check_tensor(OP, "bias", bias, "[out]")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check_layer(x, weight, bias)
    _check_adapters(x, weight, A, B, scaling)
    _check_choice_of_adapters(x, A, adapters, cu_seqlens)
    return x, weight, bias


def _check_dtype(argument: str, value: Tensor, allowed: tuple[torch.dtype, ...], meaning: str) -> None:
    if value.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(allowed))
        checks.fail(OP, argument, f"of dtype {names} ({meaning})", checks.describe(value))


def _check_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.check_size(OP, "weight", weight, 1, x.shape[1], "width of x")
    checks.check_same_device(OP, "weight", weight, "x", x)
    _check_dtype("weight", weight, (x.dtype,), "that of x")
    if bias is not None:
        checks.check_size(OP, "bias", bias, 0, weight.shape[0], "rows of weight")
        checks.check_same_device(OP, "bias", bias, "x", x)
        _check_dtype("bias", bias, (x.dtype,), "that of x")


def _check_adapters(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: Tensor) -> None:
    accumulate = checks.compute_dtype(x)
    checks.check_tensor(OP, "A", A, "[n, r, in]", FLOATS)
    checks.check_not_empty(OP, "A", A)
    checks.check_size(OP, "A", A, 2, x.shape[1], "width of x")
    checks.check_same_device(OP, "A", A, "x", x)
    _check_dtype("A", A, (x.dtype, accumulate), "that of x or the one it accumulates in")
    checks.check_tensor(OP, "B", B, "[n, out, r]", FLOATS)
    checks.check_size(OP, "B", B, 0, A.shape[0], "adapters of A")
    checks.check_size(OP, "B", B, 1, weight.shape[0], "rows of weight")
    checks.check_size(OP, "B", B, 2, A.shape[1], "rank of A")
    checks.check_same_device(OP, "B", B, "x", x)
    _check_dtype("B", B, (A.dtype,), "that of A")
    checks.check_tensor(OP, "scaling", scaling, "[n]", (accumulate, torch.float32))
    checks.check_size(OP, "scaling", scaling, 0, A.shape[0], "adapters of A")
    checks.check_same_device(OP, "scaling", scaling, "x", x)
    if scaling.requires_grad:
        checks.fail(OP, "scaling", "a constant", "a tensor that requires a gradient")


def _check_choice_of_adapters(x: Tensor, A: Tensor, adapters: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if adapters is None:
        if A.shape[0] != 1:
            checks.fail(OP, "adapters", f"an int32 tensor, because A holds {A.shape[0]} adapters", "None")
        if cu_seqlens is not None:
            checks.fail(OP, "cu_seqlens", "None where adapters is None", checks.describe(cu_seqlens))
        return
    checks.check_tensor(OP, "adapters", adapters, "[M]" if cu_seqlens is None else "[B]", (torch.int32,))
    checks.check_same_device(OP, "adapters", adapters, "x", x)
    if cu_seqlens is None:
        checks.check_size(OP, "adapters", adapters, 0, x.shape[0], "rows of x")
        return
    checks.check_cu_seqlens(OP, "cu_seqlens", cu_seqlens, "x", x)
    checks.check_size(OP, "adapters", adapters, 0, cu_seqlens.shape[0] - 1, "sequences of cu_seqlens")
