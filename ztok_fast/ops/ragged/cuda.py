"""The ragged ops of the compiled CUDA library: the same native ops as the CPU library's, which has their schemas."""

from ztok_fast.ops.ragged.cpp import (
    ragged_gather,
    ragged_gather_backward,
    ragged_layout,
    ragged_pack,
    ragged_scatter_add,
    ragged_unpack,
)

__all__ = [
    "ragged_gather",
    "ragged_gather_backward",
    "ragged_layout",
    "ragged_pack",
    "ragged_scatter_add",
    "ragged_unpack",
]
