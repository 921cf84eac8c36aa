"""Every CUDA kernel that the library launches, and what its machine code must look like: one entry per instantiation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Instruction(NamedTuple):
    """An instruction as a pattern in the disassembly, and in PTX for toolkits without a disassembler."""

    sass: str
    ptx: str


LOAD_128 = Instruction(r"\bLDG\.E[.\w]*\.128\b", r"\bld\.global[.\w]*\.v4\.\w32\b")
STORE_128 = Instruction(r"\bSTG\.E[.\w]*\.128\b", r"\bst\.global[.\w]*\.v4\.\w32\b")


@dataclass(frozen=True)
class Kernel:
    """One instantiation.

    Attributes:
        header: file in csrc/cuda that defines it; headers of kernels are free of torch, so that they compile alone.
        name: the kernel as C++ names it, template arguments spelled as a demangler does ("unsigned int", not
            "uint32_t").
        instructions: what its machine code must hold.
        registers: the most registers per thread that it may use.
        architectures: the ones it is compiled for.
    """

    header: str
    name: str
    instructions: tuple[Instruction, ...] = ()
    # 64 registers let 4 blocks of 256 threads run on one multiprocessor.
    registers: int = 64
    architectures: tuple[str, ...] = ("80", "90a")


WIDE = (LOAD_128, STORE_128)

KERNELS = (
    *(Kernel("ragged_kernel.cuh", f"ztok::ragged_pack_kernel<uint4, {offset}>", WIDE) for offset in ("int", "long")),
    Kernel("ragged_kernel.cuh", "ztok::ragged_pack_kernel<unsigned int, int>"),
    Kernel("ragged_kernel.cuh", "ztok::ragged_pack_kernel<unsigned char, long>"),
)
