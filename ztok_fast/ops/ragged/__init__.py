"""Ragged batches: between padded and packed layout, and packing several sources per sequence."""

from ztok_fast.ops.ragged.ragged_gather import RaggedBatch, ragged_gather
from ztok_fast.ops.ragged.ragged_layout import RaggedLayout, ragged_layout
from ztok_fast.ops.ragged.ragged_pack import ragged_pack, ragged_unpack
from ztok_fast.ops.ragged.ragged_scatter_add import ragged_scatter_add

__all__ = [
    "RaggedBatch",
    "RaggedLayout",
    "ragged_gather",
    "ragged_layout",
    "ragged_pack",
    "ragged_scatter_add",
    "ragged_unpack",
]
