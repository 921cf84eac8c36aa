"""Halting and integration of the compiled CPU library, csrc/cpu/{halting,integrate}.cpp.

halting_units: one pass over the mass in exact integers, O(T). integrate_units: one pass over the rows, O(T D), threads
over ranges of rows; a row that carries a remainder is read twice.
"""

from __future__ import annotations

import torch


def halting_units(mass, cu_seqlens, threshold, mode):
    return torch.ops.ztok.halting_units_native(mass, cu_seqlens, threshold, mode == "stop")


def halting_units_backward(mass, cu_seqlens, grad_weights, threshold, mode):
    return torch.ops.ztok.halting_units_backward_native(mass, cu_seqlens, grad_weights, threshold, mode == "stop")


def _same_precision(rows, weights):
    """Both as they are, or both in float64 if one of them is."""
    wide = torch.float64 in (rows.dtype, weights.dtype)
    return (rows.double(), weights.double()) if wide else (rows, weights)


def integrate_units(rows, weights, unit, ends, cu_units, total_units):
    rows_, weights_ = _same_precision(rows, weights)
    means = torch.ops.ztok.integrate_units_native(rows_, weights_, unit.int(), cu_units.int(), total_units)
    return means.to(rows.dtype)


def integrate_units_backward(rows, weights, unit, ends, cu_units, means, grad):
    rows_, weights_ = _same_precision(rows, weights)
    grad_rows, grad_weights = torch.ops.ztok.integrate_units_backward_native(
        rows_, weights_, unit.int(), cu_units.int(), means.to(rows_.dtype), grad.to(rows_.dtype), None
    )
    return grad_rows.to(rows.dtype), grad_weights.to(weights.dtype)
