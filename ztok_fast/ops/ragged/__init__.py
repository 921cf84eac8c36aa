"""Ragged batches: between padded and packed layout, and packing several sources per sequence."""

from ztok_fast.ops.ragged.contract import ragged_pack, ragged_unpack
from ztok_fast.ops.ragged.gather import (
    RaggedBatch,
    RaggedLayout,
    ragged_gather,
    ragged_layout,
    ragged_scatter_add,
)

__all__ = [
    "RaggedBatch",
    "RaggedLayout",
    "ragged_gather",
    "ragged_layout",
    "ragged_pack",
    "ragged_scatter_add",
    "ragged_unpack",
]
