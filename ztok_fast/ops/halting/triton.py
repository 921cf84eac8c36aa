"""Triton backend of halting and integration: host side. Nothing here waits for the device.

halting_units: four launches (three for at most one tile of rows), O(T log B) work, 8 bytes of extra memory per row.
integrate_units: two launches, O(T D); a row that carries a remainder is read twice.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ztok_fast.ops.backends import triton_is_interpreted
from ztok_fast.ops.halting import triton_integration as integration
from ztok_fast.ops.halting import triton_kernels as kernels
from ztok_fast.ops.triton_launch import Tiles

# These kernels wait for memory. All those over tiles of rows take tiles of the same size: some go on where others stop.
ROWS = 512


TILE_SUMS = Tiles(kernels.tile_sums_kernel, "BT", (ROWS, 4))
PREFIX = Tiles(kernels.prefix_kernel, "BT BS", (ROWS, 256, 4))
HALTING_ROWS = Tiles(kernels.rows_kernel, "BT", (ROWS, 4))
UNIT_ROWS = Tiles(integration.unit_rows_kernel, "BT", (ROWS, 4))
TAILS = Tiles(kernels.tails_kernel, "BT", (ROWS, 4))
MASS_GRADIENT = Tiles(kernels.mass_gradient_kernel, "BT BS", (ROWS, 256, 4))
OFFSETS = Tiles(kernels.offsets_kernel, "BB", (1024, 4))
TOTALS = Tiles(integration.unit_totals_kernel, "BU BR", (128, 4, 4))
# four rows in flight hide some of the memory's latency
MEANS = Tiles(integration.unit_means_kernel, "BR BC", (4, 512, 4), (4, 512, 1), (4, 512, 2), key=("D",))
GRADIENTS = Tiles(
    integration.row_gradients_kernel, "BR BC", (16, 128, 4), (16, 128, 2), (16, 128, 8), key=("D",), maxnreg=255
)


class Prefix(NamedTuple):
    """int64 [T + 1] prefix sums, and the grid over tiles of rows."""

    sums: Tensor
    grid: tuple[int]


class UnitRows(NamedTuple):
    """The table of units of `triton_integration.py`, int64 [K] each."""

    first_rows: Tensor
    end_rows: Tensor


def _bits(value: float) -> int:
    """The bits of a float64: float arguments of kernels are float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def prefix_sums(mass: Tensor, threshold: float, mode: str) -> Prefix:
    """Prefix sums of the fixed-point mass, or for "stop" of the rows whose mass reaches the threshold."""
    rows, stop = mass.shape[0], mode == "stop"
    bits = _bits(threshold if stop else kernels.ONE.value / threshold)
    grid = (max(1, triton.cdiv(rows, ROWS)),)
    prefix = torch.empty(rows + 1, dtype=torch.int64, device=mass.device)
    sums = torch.empty(grid[0], dtype=torch.int64, device=mass.device)
    if grid[0] > 1:
        TILE_SUMS[grid](mass, sums, rows, bits, STOP=stop)
    PREFIX[grid](mass, sums, prefix, rows, bits, STOP=stop)
    return Prefix(prefix, grid)


def halting_units(mass: Tensor, cu_seqlens: Tensor, threshold: float, mode: str):
    """See `ztok_fast.ops.halting_units`; returns weights, ends, unit, counts and cu_units."""
    rows, sequences = mass.shape[0], cu_seqlens.shape[0] - 1
    stop = mode == "stop"
    weights = mass.new_empty((rows, 2), dtype=torch.float64 if mass.dtype == torch.float64 else torch.float32)
    ends = mass.new_empty(rows, dtype=torch.bool)
    unit = mass.new_empty(rows, dtype=torch.int32)
    counts = mass.new_empty(sequences, dtype=torch.int32)
    cu_units = mass.new_empty(sequences + 1, dtype=torch.int32)
    prefix = prefix_sums(mass, threshold, mode)
    OFFSETS[(1,)](prefix.sums, cu_seqlens, counts, cu_units, sequences, STOP=stop)
    HALTING_ROWS[prefix.grid](
        mass, prefix.sums, cu_seqlens, cu_units, weights, ends, unit, rows, sequences,
        _bits(threshold / kernels.ONE.value), STOP=stop,
    )  # fmt: skip
    return weights, ends, unit, counts, cu_units


def halting_units_backward(mass, cu_seqlens, grad_weights, threshold, mode):
    """Gradient of the mass [T] from that of the weights [T, 2]: the prefix sums again, and two launches."""
    grad = torch.empty_like(mass)
    rows, sequences = mass.shape[0], cu_seqlens.shape[0] - 1
    if rows == 0:
        return grad
    prefix = prefix_sums(mass, threshold, mode)
    # the interpreter goes through the segmented scan element by element
    size = 16 if triton_is_interpreted() else ROWS
    tiles = triton.cdiv(rows, size)
    tails = torch.empty(tiles, dtype=torch.float64, device=mass.device)
    shared = grad_weights, prefix.sums, cu_seqlens, tails
    if mode == "fire" and tiles > 1:
        TAILS.at_most(BT=size)[(tiles,)](*shared, rows, sequences)
    MASS_GRADIENT.at_most(BT=size)[(tiles,)](*shared, grad, rows, sequences, STOP=mode == "stop")
    return grad


def unit_rows(unit: Tensor, ends: Tensor, cu_units: Tensor, total_units: int) -> UnitRows:
    """The table of units from the units of rows; zeros for a unit that has no row."""
    table = UnitRows(*unit.new_zeros((2, total_units), dtype=torch.int64))
    rows = unit.shape[0]
    if rows:
        UNIT_ROWS[(triton.cdiv(rows, ROWS),)](unit, ends, cu_units, *table, rows, cu_units.shape[0] - 1, total_units)
    return table


def unit_means(rows: Tensor, weights: Tensor, table: UnitRows, cu_units: Tensor, means: Tensor) -> None:
    """Write the means [total_units, D]."""
    total_units, width = means.shape
    if means.numel() == 0:
        return
    wide = torch.float64 in (rows.dtype, weights.dtype)
    tiles = MEANS.at_most(BC=triton.next_power_of_2(width))
    tiles[total_units, triton.cdiv(width, tiles.BC)](
        rows, weights, *table, cu_units, means, cu_units.shape[0] - 1, total_units, D=width, WIDE=wide
    )


def integrate_units(rows, weights, unit, ends, cu_units, total_units):
    """See `ztok_fast.ops.integrate_units`."""
    means = rows.new_empty((total_units, rows.shape[1]))
    unit_means(rows, weights, unit_rows(unit, ends, cu_units, total_units), cu_units, means)
    return means


def row_gradients(rows, weights, unit, ends, cu_units, table, means, grad, grad_end_rows=None):
    """Gradients of the rows and the weights from that of the means; `grad_end_rows` [K, D] is added to those of the
    rows that end the units."""
    (count, width), total_units, sequences = rows.shape, means.shape[0], cu_units.shape[0] - 1
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
    if count == 0:
        return grad_rows, grad_weights
    wide = torch.float64 in (rows.dtype, weights.dtype)
    inverse = rows.new_empty(max(1, total_units), dtype=torch.float64 if wide else torch.float32)
    if total_units:
        TOTALS[(triton.cdiv(total_units, TOTALS.BU),)](
            weights, *table, cu_units, inverse, sequences, total_units, WIDE=wide
        )
    # float64 with more than 16 columns spills, on sm_100 at 32
    tiles = GRADIENTS.at_most(BC=min(16 if wide else 128, triton.next_power_of_2(max(width, 1))))
    tiles[(triton.cdiv(count, tiles.BR),)](
        rows, weights, unit, ends, table.first_rows, cu_units, inverse, means, grad, grad_end_rows, grad_rows,
        grad_weights, count, sequences, total_units,
        D=width, WIDE=wide, END_ROWS=grad_end_rows is not None,
    )  # fmt: skip
    return grad_rows, grad_weights


def integrate_units_backward(rows, weights, unit, ends, cu_units, means, grad):
    """Gradients of the rows [T, D] and of the weights [T, 2] from that of the means [K, D]: three launches."""
    table = unit_rows(unit, ends, cu_units, means.shape[0])
    return row_gradients(rows, weights, unit, ends, cu_units, table, means, grad)
