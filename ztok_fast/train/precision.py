"""The dtype of matrix products in training: bfloat16 autocast where the processor multiplies it natively.

Weights, gradients and the optimiser's state are float32 in every case.
"""

from __future__ import annotations

import torch

from ztok_fast.train.settings import PRECISIONS


def autocast_dtype(precision: str, device_type: str = "cpu") -> torch.dtype | None:
    """The dtype of matrix products for a ``precision`` setting; None for that of the weights.

    "auto" takes bfloat16 on CUDA and on CPUs with AVX512-BF16 or AMX. On others it is slower than float32.

    Raises:
        ValueError: no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "auto":
        native = device_type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else None
    return torch.bfloat16 if precision == "bfloat16" else None
