"""Command line of `python -m bench.tune`."""

from __future__ import annotations

import argparse
import os
import tempfile
import time

import bench.tune
from bench.tune.dry import report
from bench.tune.entry import all_entries
from bench.tune.measure import measure
from ztok_fast.ops.triton_tables import architecture


def main(argv: list[str] | None = None) -> None:
    """Time candidates, or compile them."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=bench.tune.__doc__.split("\n\n")[0])
    parser.add_argument("--dry", action="store_true", help="compile only; no GPU is needed")
    parser.add_argument("--seconds", type=float, default=50, help="stop timing after so many seconds")
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100], help="for --dry")
    parser.add_argument("--most", type=int, help="for --dry: so many candidates of each entry")
    parser.add_argument("--tables", nargs="+", default=[], help="families or tables, as nearest or nearest.STEPS")
    arguments = parser.parse_args(argv)
    entries = list(all_entries(arguments.tables))
    if not entries:
        parser.error(f"--tables: expected families or tables, got {' '.join(arguments.tables)}")
    if not arguments.dry:
        time_them(entries, time.monotonic() + arguments.seconds)
        return
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    os.environ["TRITON_DUMP_PTXAS_LOG"] = os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        report(entries, arguments.capabilities, arguments.most)


def time_them(entries, deadline: float) -> None:
    """Print times of the candidates on this device."""
    import torch
    import triton

    if not torch.cuda.is_available():
        raise SystemExit("python -m bench.tune: a CUDA device is needed to time candidates; --dry compiles them")
    print(f"# {torch.cuda.get_device_name()}, triton {triton.__version__}, torch {torch.__version__}")
    arch = architecture(torch.cuda.get_device_capability())
    timer = lambda call: triton.testing.do_bench(call, return_mode="median")  # noqa: E731
    for text in measure(entries, arch, deadline, timer, (triton.runtime.errors.OutOfResources,)):
        print(text, flush=True)


if __name__ == "__main__":
    main()
