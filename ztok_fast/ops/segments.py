"""Sums and look-ups over packed rows, shared by the reference ops."""

import torch


def segment_sum(values: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """Add rows `values` [N, ...] into `size` sums by `index` [N] in [0, size]; what goes to `size` itself is dropped.

    The order of additions is that of the rows, so the result is the same from run to run on every device.
    """
    sums = values.new_zeros((size + 1, *values.shape[1:]))
    if values.device.type == "cpu":
        return sums.index_add(0, index.long(), values)[:size]
    # index_add uses atomics on CUDA, in no fixed order; accumulating index_put sorts
    return sums.index_put((index.long(),), values, accumulate=True)[:size]


def sequence_of(cu_seqlens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Which sequence each packed position lies in (int64); positions past the end get B."""
    return torch.searchsorted(cu_seqlens, positions.to(cu_seqlens.dtype), right=True) - 1


def adapters_of_rows(rows: int, adapters: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """The adapter of each row, from those of the rows or of the sequences that `cu_seqlens` cut them into."""
    if cu_seqlens is None:
        return adapters
    return adapters.index_select(0, sequence_of(cu_seqlens, torch.arange(rows, device=adapters.device)))


def exclusive_cumsum(values: torch.Tensor) -> torch.Tensor:
    """[N] -> int64 [N + 1]: sums of all elements before each position, the total last."""
    sums = torch.cumsum(values.long(), 0)
    return torch.cat([sums.new_zeros(1), sums])
