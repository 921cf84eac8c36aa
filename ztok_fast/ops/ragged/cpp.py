"""The ragged ops of the compiled CPU library. Loading it is what the requirements table does before it chooses this."""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_pack(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    return torch.ops.ztok.ragged_pack_native(padded, cu_seqlens, total)
