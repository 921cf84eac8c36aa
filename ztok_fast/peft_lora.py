"""`peft.tuners.lora.Linear` through `ops.lora_linear`; see `ztok_fast.patching`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ztok_fast.ops import lora_linear

LoraLayer = Any
"""A `peft.tuners.lora.Linear`. PEFT is not imported here, and it sets most attributes of a layer when it makes one."""

BASE = "__base__"  # PEFT's name, in `adapter_names`, for no adapter


def why_not(layer: LoraLayer) -> str | None:
    """Why the active adapter keeps PEFT's forward pass; None where it does not, or where there is none to run."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) > 1:
        return f"{len(active)} adapters are active at once"
    return _why_not(layer, active)


def forward(layer: LoraLayer, patched, x: Tensor, *args, **kwargs) -> Tensor:
    """The layer's forward pass: through `lora_linear`, or PEFT's own where that is not the same.

    Modules and parameters are looked up in the dictionaries of their parents: by attribute each costs half a
    microsecond, together more than the product of a decode step.
    """
    if layer._disable_adapters or layer.merged_adapters:
        return patched.original(layer, x, *args, **kwargs)
    shrinks, expands = layer._modules["lora_A"]._modules, layer._modules["lora_B"]._modules
    names = kwargs.get("adapter_names")
    reason = None
    if names is not None:
        layer._check_forward_args(x, *args, **kwargs)
        used = [name for name in shrinks if name in names]
    else:
        active = layer._active_adapter
        used = [name for name in ((active,) if isinstance(active, str) else active) if name in shrinks]
        if len(used) > 1:
            reason = f"{len(used)} adapters are active at once"
    if not used:
        return patched.original(layer, x, *args, **kwargs)
    if args or kwargs and any(key != "adapter_names" and value is not None for key, value in kwargs.items()):
        reason = "it is called with arguments of a variant"
    reason = reason or _why_not(layer, used, x.dtype)
    if reason is not None:
        patched.refuse(reason)
        return patched.original(layer, x, *args, **kwargs)
    base = layer._modules["base_layer"]
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    if type(base) is not nn.Linear:
        weight = weight.T  # Conv1D holds it as [in, out]
    if names is None:
        A = _as_one_of_one(shrinks[used[0]]._parameters["weight"], patched.cache, "A")
        B = _as_one_of_one(expands[used[0]]._parameters["weight"], patched.cache, "B")
        adapters = None
    else:
        A = torch.stack([shrinks[name]._parameters["weight"] for name in used])
        B = torch.stack([expands[name]._parameters["weight"] for name in used])
        adapters = _row_adapters(x, names, used)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    y = lora_linear(rows, weight, bias, A, B, _scaling(layer, used, x, patched.cache), adapters)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


def _as_one_of_one(weight: Tensor, cache: dict, key: str) -> Tensor:
    """The weight as [1, ...]; without gradients the view of the last call, if it is still one of the same memory."""
    if torch.is_grad_enabled():
        return weight.unsqueeze(0)
    kept = cache.get(key)
    if (
        kept is None
        or kept[0] is not weight
        or kept[1].data_ptr() != weight.data_ptr()
        or kept[1].dtype != weight.dtype
    ):
        kept = (weight, weight.unsqueeze(0))
        if _outlives_the_call(kept[1]):
            cache[key] = kept
    return kept[1]


def _why_not(layer: LoraLayer, names: Sequence[str], x_dtype: torch.dtype | None = None) -> str | None:
    modules = layer._modules
    base = modules["base_layer"]
    kind = type(base)
    if kind is not nn.Linear and not (kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"):
        return f"its base layer is a {kind.__name__}"
    if _is_hooked(base):
        return "there are hooks on its base layer"
    weight = base._parameters["weight"]
    dtype = weight.dtype
    if x_dtype is not None and x_dtype != dtype and not torch.is_autocast_enabled(weight.device.type):
        return f"it is called with {x_dtype} on a base layer of {dtype}"
    shape = None
    for name in names:
        shrink, expand = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        if name in layer.lora_variant:
            return f"adapter {name!r} is a variant ({type(layer.lora_variant[name]).__name__})"
        if layer.training and type(modules["lora_dropout"]._modules[name]) is not nn.Identity:
            return f"dropout in training mode (adapter {name!r})"
        plain = type(shrink) is nn.Linear and type(expand) is nn.Linear
        if not plain or _is_hooked(shrink) or _is_hooked(expand):
            return f"adapter {name!r} is not two plain linear layers, or has hooks"
        if expand._parameters["bias"] is not None:
            return f"adapter {name!r} has a bias"
        if type(layer.scaling[name]) not in (float, int):
            return f"the scaling of adapter {name!r} is a {type(layer.scaling[name]).__name__}"
        A, B = shrink._parameters["weight"], expand._parameters["weight"]
        adapter_dtype = A.dtype
        if adapter_dtype != dtype and adapter_dtype != torch.float32 or B.dtype != adapter_dtype:
            return f"adapter {name!r} of {adapter_dtype} on a base layer of {dtype}"
        if adapter_dtype != dtype and not layer.cast_input_dtype_enabled:
            return "the cast of its input is switched off"
        if len(names) > 1:
            if shape is not None and shape != (A.shape, adapter_dtype):
                return "adapters of different rank or dtype are mixed in a batch"
            shape = A.shape, adapter_dtype
    return None


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _scaling(layer: LoraLayer, names: list[str], x: Tensor, cache: dict) -> Tensor:
    """The adapters' scaling as a tensor, kept for the values, device and precision that it was last asked for."""
    key = (*(layer.scaling[name] for name in names), x.device, x.dtype == torch.float64)
    kept = cache.get("scaling")
    if kept is None or kept[0] != key:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.inference_mode(False):  # a pass with gradients may be the next to use it
            kept = (key, torch.tensor(key[:-2], dtype=dtype, device=x.device))
        if _outlives_the_call(kept[1]):
            cache["scaling"] = kept  # key and value in one assignment, for the other threads
    return kept[1]


def _outlives_the_call(tensor: Tensor) -> bool:
    """Whether a tensor may be kept: `torch.func` transforms and dispatch modes make ones that end with them."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _row_adapters(x: Tensor, names: list[str], used: list[str]) -> Tensor:
    """The adapter of each row of x [B, ..., in], an index into `used`; -1 for the base layer and for unknown names."""
    index = {name: i for i, name in enumerate(used)}
    sequences = torch.tensor([index.get(name, -1) for name in names], dtype=torch.int32, device=x.device)
    return sequences.repeat_interleave(x.numel() // (x.shape[-1] * max(len(names), 1)))
