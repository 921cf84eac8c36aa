"""Index arithmetic of packed batches: ranges and offsets. Joined sequences are `ztok_fast.ops.ragged_layout`."""

from __future__ import annotations

import torch


def offsets(lengths: torch.Tensor) -> torch.Tensor:
    """``[B]`` lengths to int32 ``[B + 1]`` offsets."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def sequence_of_row(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """The sequence that every packed row belongs to, int64 ``[total]``."""
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=total)


def position_in_sequence(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """0-based position of every packed row in its own sequence, int64 ``[total]``."""
    return torch.arange(total, device=cu_seqlens.device) - cu_seqlens.long()[sequence_of_row(cu_seqlens, total)]


def expand_ranges(begin: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of ranges [begin_i, end_i), one range after another: int64 ``[R]`` rows, int32 offsets."""
    cu = offsets(end - begin)
    total = int(cu[-1])
    return begin.long()[sequence_of_row(cu, total)] + position_in_sequence(cu, total), cu


def split_segments(lengths: list[int], segment_length: int) -> tuple[list[int], list[int]]:
    """Cut documents of ``lengths`` tokens into segments.

    Returns:
        Tokens of every segment in order, and the number of segments of every document. An empty
        document has no segment.
    """
    segments, counts = [], []
    for length in lengths:
        full, rest = divmod(length, segment_length)
        own = [segment_length] * full + ([rest] if rest else [])
        segments += own
        counts.append(len(own))
    return segments, counts


def block_bounds(size: int, blocks: int) -> list[tuple[int, int]]:
    """``size`` columns cut into ``blocks`` consecutive ranges as equal as can be; some are empty if blocks > size."""
    edges = [size * block // blocks for block in range(blocks + 1)]
    return list(zip(edges[:-1], edges[1:]))
