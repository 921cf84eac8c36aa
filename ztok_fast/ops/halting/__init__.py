"""Halting: division of packed sequences into units, and integration over units."""

from ztok_fast.ops.halting.contract import HaltingUnits, halting_units, integrate_units

__all__ = ["HaltingUnits", "halting_units", "integrate_units"]
