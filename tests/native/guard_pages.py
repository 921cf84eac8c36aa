"""Tensors that abut a page without access, so that one element read or written too far ends in a fault.

A canary sees only what is written near a tensor. A guard page also sees reads, and anything up to `GUARD_BYTES` away.
A tensor ends (`"end"`) or begins (`"begin"`) at the guard page to the byte; the bytes between its other side and the
guard page there are a canary.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

SIDES = ("end", "begin")
GUARD_BYTES = 16 * mmap.PAGESIZE
CANARY = 77
PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _protect(address: int) -> None:
    if _libc.mprotect(address, GUARD_BYTES, PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


class Guarded:
    """A copy of a tensor, with its shape and strides, at a guard page.

    Attributes:
        tensor: the copy. It keeps the memory. An empty tensor has none and is the tensor itself.
    """

    def __init__(self, tensor: torch.Tensor, side: str):
        self.tensor = tensor
        self._canary = torch.empty(0, dtype=torch.uint8)
        if tensor.numel() == 0:
            return
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        wanted = span * tensor.element_size()
        usable = -(-wanted // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, usable + 2 * GUARD_BYTES)
        everything = torch.frombuffer(memory, dtype=torch.uint8)
        everything[GUARD_BYTES : GUARD_BYTES + usable] = CANARY
        first = GUARD_BYTES + (usable - wanted if side == "end" else 0)
        held = everything[first : first + wanted].view(tensor.dtype)
        held.copy_(tensor.as_strided((span,), (1,)))  # elements may share memory
        self.tensor = held.as_strided(tensor.shape, tensor.stride(), held.storage_offset())
        low, high = (GUARD_BYTES, first) if side == "end" else (first + wanted, GUARD_BYTES + usable)
        self._canary = everything[low:high]
        _protect(everything.data_ptr())
        _protect(everything.data_ptr() + GUARD_BYTES + usable)

    def intact(self) -> bool:
        """Whether nothing was written between the tensor and the far guard page."""
        return bool((self._canary == CANARY).all())


def guard(tensor: torch.Tensor, side: str) -> torch.Tensor:
    """The tensor of `Guarded`."""
    return Guarded(tensor, side).tensor
