"""Every Triton kernel as it is launched, for `tests/ops/test_aot.py`, which compiles it ahead of time without a GPU.

The cases come from the tables of launch configurations: for every table there is a function that makes the cases of
one entry, so that every entry of every architecture is compiled. To add a kernel, add its case to the function of its table (`aot_nearest.py`, `aot_lora.py`,
`aot_units.py`, `aot_zhead.py`):

    Case(
        f"halting-scan-{text_of(key)}-{arch}",               # unique; shows in test ids
        "ztok_fast.ops.halting.triton:scan_kernel",          # the @triton.jit function
        {"mass": "*fp32", "units": "*i32", "rows": "i32"},   # run-time arguments in any order
        {"BLOCK": entry.rows},                               # constexpr arguments
        num_warps=entry.warps,
    )

Types are *fp16, *bf16, *fp32, *fp64, *i1, *i8, *i16, *i32, *i64 for pointers and i32, i64, fp32, fp64 for numbers.
Pointers are taken to be aligned to 16 bytes, as those of whole tensors are; name the numbers that are multiples of 16
in `divisible`. Any other pointer that is passed as None goes into the constexprs as None.

For each architecture the test asserts that the code has no stack frame and no spills, at most a block's shared memory,
and for sm_90a the instructions named in `sm90_needs`. What is not in a file's QUICK is left to the slow tests.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace

from tests.ops import aot_lora, aot_nearest, aot_units, aot_zhead
from tests.ops.aot_case import ARCHITECTURES, SHARED_LIMITS, Case

__all__ = ["ARCHITECTURES", "CASES", "SHARED_LIMITS", "Case", "by_name", "cases_of", "tables_of"]

# family -> table -> function that makes the cases of one entry
MAKERS = {
    "nearest": aot_nearest.TABLES,
    "halting": aot_units.HALTING_TABLES,
    "quantize": aot_units.QUANTIZE_TABLES,
    "lora": aot_lora.TABLES,
    "zhead": aot_zhead.TABLES,
}
QUICK = {*aot_nearest.QUICK, *aot_units.QUICK, *aot_lora.QUICK, *aot_zhead.QUICK}


def tables_of(family: str) -> dict[str, dict]:
    """The tables of a family by their names."""
    module = importlib.import_module(f"ztok_fast.ops.{family}.triton_configs")
    is_table = lambda name, value: name.isupper() and isinstance(value, dict)  # noqa: E731
    return {name: value for name, value in vars(module).items() if is_table(name, value)}


def cases_of(family: str, table: str, arch: str, key: tuple, entry) -> Iterator[Case]:
    """The kernels of one entry of a table, or of a candidate for it."""
    return MAKERS[family][table](arch, key, entry)


def _all() -> Iterator[Case]:
    for family in MAKERS:
        for table, by_arch in tables_of(family).items():
            for arch, entries in by_arch.items():
                for key, entry in entries.items():
                    yield from cases_of(family, table, arch, key, entry)
    yield from aot_lora.rest()
    yield from aot_nearest.losses()


CASES = [replace(case, slow=case.name not in QUICK) for case in _all()]

# compiled by the test of the test alone
SPILLS = Case("spills", "tests.ops.aot_spills:spill_kernel", {"x": "*fp32", "y": "*fp32"}, {"B": 64}, num_warps=1)


def by_name() -> dict[str, Case]:
    """All cases by their names."""
    return {case.name: case for case in (*CASES, SPILLS)}
