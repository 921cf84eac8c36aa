"""The LoRA linear layer for few rows in CUDA C++ (`csrc/cuda/lora_decode.cu`): decode, bound by reading the weight.

The requirements table sends at most 64 rows here and more to another backend; loading the library is what it does
before it chooses this. No host synchronisation: capturable in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: Tensor,
    adapters: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """As `ztok_fast.ops.lora_linear`. Rows of `x` and `weight` are read in place whatever the distance between them. Of a
    weight whose rows are themselves strided a contiguous copy is made at every call; a transposed one, as in GPT-2, the
    requirements table sends to another backend.

    Reads `weight` once, B once per group of rows that share an adapter, A once per 8 rows. Scratch: M r floats and, for
    layers too narrow to occupy the device, up to 16 partial sums of the result in float32.
    """
    return torch.ops.ztok.lora_decode_native(x, weight, bias, A, B, scaling, adapters, cu_seqlens)
