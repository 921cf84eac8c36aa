"""Nearest-code search."""

from ztok_fast.ops.nearest.contract import Assignment, codebook_assign

__all__ = ["Assignment", "codebook_assign"]
