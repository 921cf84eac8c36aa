"""The LoRA linear layer of the compiled CPU library (csrc/cpu/lora.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

lora_linear = torch.ops.ztok.lora_linear_native.default


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: Tensor,
    adapters: Tensor | None,
    cu_seqlens: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.ztok.lora_linear_backward_native.default(
        grad, x, weight, A, B, scaling, adapters, cu_seqlens, *needs
    )
