"""Z head: the next Z-token from the Z rows alone."""

from ztok_fast.ops.zhead.z_select import Selection, z_select

__all__ = ["Selection", "z_select"]
