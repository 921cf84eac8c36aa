"""Every CUDA kernel that the library launches and what its machine code must hold: one entry per instantiation."""

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


MMA = Instruction(r"\bHMMA\.16816\.F32\b", r"\bmma\.sync\.aligned\.m16n8k16\b")
WIDE = (LOAD_128, STORE_128)
# widest unit that the alignment allows -> what moves it
UNITS = {"uint4": WIDE, "uint2": (), "unsigned int": (), "unsigned short": (), "unsigned char": ()}
# element of a sum -> columns in 16 bytes
ELEMENTS = {"c10::Half": 8, "c10::BFloat16": 8, "float": 4, "double": 2}

RAGGED = (
    *(
        Kernel("ragged_kernel.cuh", f"ztok::copy_rows_kernel<{unit}, ztok::{locator}<{unit}>>", wide)
        for locator in ("PackRows", "UnpackRows")
        for unit, wide in UNITS.items()
    ),
    *(
        Kernel("ragged_gather_kernel.cuh", f"ztok::copy_rows_kernel<{unit}, ztok::{locator}<{unit}>>", wide)
        for locator in ("GatherRows", "ReturnRows")
        for unit, wide in UNITS.items()
    ),
    Kernel("ragged_gather_kernel.cuh", "ztok::layout_kernel"),
    Kernel("ragged_gather_kernel.cuh", "ztok::add_offsets_kernel"),
    *(
        Kernel("ragged_sum_kernel.cuh", f"ztok::sum_chunks_kernel<{element}, {columns}, {number}>", wide)
        for element, wide_columns in ELEMENTS.items()
        for columns, wide in ((wide_columns, WIDE), (1, ()))
        for number in ("unsigned int", "unsigned long")
    ),
    *(
        Kernel("ragged_sum_kernel.cuh", f"ztok::join_chunks_kernel<{element}, {number}>")
        for element in ELEMENTS
        for number in ("unsigned int", "unsigned long")
    ),
    *(
        Kernel("ragged_sum_kernel.cuh", f"ztok::make_pairs_kernel<{number}, {gathered}>")
        for number in ("unsigned int", "unsigned long")
        for gathered in ("true", "false")
    ),
)


def _lora_decode_kernels():
    """Those of bfloat16 and float32, and one of float16, whose code differs by the name of an instruction."""
    for dtype, row_tiles, aligned in (
        *(("__nv_bfloat16", tiles, "true") for tiles in (1, 2, 4, 8)),
        *(("float", tiles, "true") for tiles in (1, 8)),
        *((dtype, 8, "false") for dtype in ("__nv_bfloat16", "float")),
        ("__half", 4, "true"),
    ):
        one_block = row_tiles == 8
        yield Kernel(
            "lora_decode_kernel.cuh",
            f"ztok::lora_decode_kernel<{dtype}, {row_tiles}, {aligned}>",
            ((LOAD_128,) if aligned == "true" else ()) + ((MMA,) if dtype != "float" else ()),
            # blocks of 256 threads that are to share a multiprocessor: one or two
            registers=255 if one_block else 128,
        )
    for dtype, adapter, aligned in (
        ("__nv_bfloat16", "__nv_bfloat16", "true"),
        ("__nv_bfloat16", "float", "true"),
        ("float", "float", "true"),
        ("__half", "__half", "true"),
        ("__nv_bfloat16", "__nv_bfloat16", "false"),
    ):
        yield Kernel(
            "lora_decode_shrink.cuh",
            f"ztok::lora_shrink_kernel<{dtype}, {adapter}, {aligned}>",
            (LOAD_128,) if aligned == "true" else (),
            registers=128,
        )


KERNELS = (*RAGGED, *_lora_decode_kernels())
