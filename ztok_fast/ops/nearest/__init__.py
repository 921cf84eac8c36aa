"""Nearest-code search."""

from ztok_fast.ops.nearest.codebook_assign import Assignment, codebook_assign

__all__ = ["Assignment", "codebook_assign"]
