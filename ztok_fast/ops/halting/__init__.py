"""Halting: division of packed sequences into units, and integration over units."""
