"""How the launchers of Triton kernels look up what to launch with: small checked-in tables, no search in a user's call.

A table maps an architecture to entries {(size at most, *kind): configuration}. The size is the dimension that matters
to the kernel (rows, width), the kind whatever else the choice depends on. The entry of the least bound that holds the
size is taken; the last bound is ANY, so that every shape has one. The tables are in the `triton_configs.py` of each
family.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# said at launches: the default differs between releases of Triton
FUSION = {"enable_fp_fusion": True}
# the bound of an entry for sizes without a limit
ANY = float("inf")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

Entries = dict[tuple, NamedTuple]
Table = dict[str, Entries]


def capability_of(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of the tensor's device; (0, 0) on others, where Triton's interpreter runs the kernels."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (0, 0)


def architecture(capability: tuple[int, int]) -> str:
    """The tables' name of a compute capability; (0, 0), the interpreter, takes the entries of sm_90."""
    major = capability[0] or 9
    return "sm_80" if major < 9 else "sm_90" if major < 10 else "sm_100"


def for_all(entries: Entries) -> Table:
    """A table with the same entries for every architecture."""
    return {name: dict(entries) for name in ARCHITECTURES}


def find(table: Table, capability: tuple[int, int], size: int, *kind) -> NamedTuple | None:
    """The entry of the least bound that holds `size`; None if there is none."""
    entries = table[architecture(capability)]
    fits = [key for key in entries if key[0] >= size and key[1:] == kind]
    return entries[min(fits, key=lambda key: key[0])] if fits else None


def look_up(table: Table, capability: tuple[int, int], size: int, *kind):
    """As `find`, of a table that has an entry for every size.

    Raises:
        LookupError: it has none for this kind.
    """
    found = find(table, capability, size, *kind)
    if found is None:
        name = architecture(capability)
        raise LookupError(f"no entry of {name} for {(size, *kind)}; there are {', '.join(map(str, table[name]))}")
    return found
