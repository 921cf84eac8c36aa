"""Candidates for the tables of `ztok_fast/ops/nearest/triton_configs.py`: `python -m bench.tune_triton [--dry]`.

On a machine with a CUDA device every candidate tile is timed on one shape per entry (median of CUDA events, cold L2)
and the fastest is printed as a line for the table. With --dry nothing is timed and no GPU is needed: every candidate is
compiled ahead of time for the architectures and its registers, spills and shared memory are printed; the checked-in
table was chosen from that.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Iterator

from ztok_fast.ops.nearest import triton_configs as configs
from ztok_fast.ops.nearest.triton_configs import Tile

# (row terms, code terms)
TERMS = ((1, 1), (2, 1), (2, 2))
WHOLE_WIDTHS = (64, 128, 256)
# rows, codes and width that the tiles are timed on; the width of WHOLE's is in their keys
STEP_SHAPE = (16384, 8192, 1024)
WHOLE_SHAPE = (131072, 1024)


def whole_candidates(width: int) -> list[Tile]:
    """Tiles for `residual_search_kernel`."""
    return [
        Tile(rows, codes, width, warps, 2)
        for rows, codes, warps in ((64, 64, 4), (64, 64, 8), (128, 64, 8), (128, 32, 8), (64, 32, 8), (32, 64, 4))
    ]


def step_candidates() -> list[Tile]:
    """Tiles for `scan_kernel`."""
    return [
        Tile(rows, codes, width, warps, stages)
        for rows, codes, width, warps, stages in (
            (128, 256, 64, 8, 3), (128, 256, 32, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 3),
            (128, 128, 64, 8, 2), (128, 128, 32, 8, 2), (128, 64, 32, 8, 3), (64, 128, 64, 4, 3), (64, 128, 32, 4, 3), (64, 64, 32, 4, 2),
        )
    ]  # fmt: skip


def entries() -> Iterator[tuple[str, tuple[int, ...], list[Tile]]]:
    """Table, key and candidates of every entry."""
    for terms in TERMS:
        yield "STEPS", terms, step_candidates()
        yield "WIDE", terms, step_candidates()
    for width in WHOLE_WIDTHS:
        for terms in TERMS:
            yield "WHOLE", (width, *terms), whole_candidates(width)


def dry(capabilities: list[int], tables: list[str]) -> None:
    """Compile every candidate and print what it takes."""
    from tests.ops.aot_cases import SHARED_LIMITS, nearest_case
    from tests.ops.aot_compile import compile_case

    print(f"{'arch':<7}{'table':<7}{'key':<14}{'tile':<48}{'regs':>5}{'stack':>7}{'shared':>8}")
    for capability in capabilities:
        arch = configs.architecture((capability // 10, 0))
        for table, key, candidates in entries():
            for tile in candidates if table in tables else ():
                report = compile_case(nearest_case(table, arch, key, tile), capability)
                fits = report["stack"] == 0 and report["shared"] <= SHARED_LIMITS[capability]
                print(
                    f"{arch:<7}{table:<7}{str(key):<14}{str(tuple(tile)):<48}{report['registers']:>5}"
                    f"{report['stack']:>7}{report['shared']:>8}{'' if fits else '  no'}",
                    flush=True,
                )


def measure(deadline: float, tables: list[str]) -> None:
    """Time every candidate on this device until the deadline and print the fastest of each entry."""
    import torch
    import triton

    from ztok_fast.ops.nearest import triton as nearest

    capability = torch.cuda.get_device_capability()
    arch = configs.architecture(capability)
    print(f"# {torch.cuda.get_device_name()}, triton {triton.__version__}, torch {torch.__version__}")
    for table, key, candidates in entries():
        if table not in tables:
            continue
        *width, row_terms, code_terms = key
        rows, size, width = (*WHOLE_SHAPE, width[0]) if width else STEP_SHAPE
        row_type = torch.bfloat16 if row_terms == 1 else torch.float32
        code_type = torch.bfloat16 if code_terms == 1 else torch.float32
        x = torch.randn(rows, width, device="cuda").to(row_type)
        book = torch.randn(1, size, width, device="cuda").to(code_type)
        timed = []
        for tile in candidates:
            if time.monotonic() > deadline:
                print(f"# out of time at {table} {key}: the remaining candidates were not timed")
                return
            getattr(configs, table)[arch][key] = tile
            try:
                milliseconds = triton.testing.do_bench(functools.partial(nearest.search, x, book, "l2", None, False))
                timed.append((milliseconds, tile))
            except triton.runtime.errors.OutOfResources as reason:
                print(f"# {table} {key} {tuple(tile)}: {reason}")
        for milliseconds, tile in sorted(timed):
            print(f"# {table} {key} {tuple(tile)}: {milliseconds:.4f} ms")
        if timed:
            print(f"{table}[{arch!r}][{key}] = Tile{tuple(min(timed)[1])}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune_triton", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dry", action="store_true", help="compile only; no GPU is needed")
    parser.add_argument("--seconds", type=float, default=50, help="stop timing after so many seconds")
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100], help="for --dry")
    parser.add_argument("--tables", nargs="+", choices=["WHOLE", "WIDE", "STEPS"], default=["WHOLE", "WIDE", "STEPS"])
    arguments = parser.parse_args(argv)
    if not arguments.dry:
        measure(time.monotonic() + arguments.seconds, arguments.tables)
        return
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    os.environ["TRITON_DUMP_PTXAS_LOG"] = os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        dry(arguments.capabilities, arguments.tables)


if __name__ == "__main__":
    main()
