"""Halting: division of packed sequences into units, and integration over units."""

from ztok_fast.ops.halting.halting_units import HaltingUnits, halting_units
from ztok_fast.ops.halting.integrate_units import integrate_units

__all__ = ["HaltingUnits", "halting_units", "integrate_units"]
