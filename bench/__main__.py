"""Times the ops against baselines on this machine: verified first, then measured, written as JSON.

    python -m bench                                         the default set on the CPU, all ops, backends and baselines
    python -m bench --ops codebook_assign z_select --set quick
    python -m bench --cases "M=4096,V=4096" --json docs/results/bench-cpu.json
    python -m bench --device cuda --plots out/figures
    python -m bench --ops compress decompress               whole runs of the codec, which no other call includes
    python -m bench --list --set full                       the cases and nothing else
    compute-sanitizer --error-exitcode 9 python -m bench --check --device cuda

Results are added to the JSON file case by case, so a run that is interrupted keeps what it has and several runs make
one file. Exit status: 0; 1 when a backend's answer was wrong or it raised; 130 when interrupted. `docs/benchmarks.md`
describes the method.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.machine import ROOT, pin_threads, restart_with_pinned_environment

SETS = ("tiny", "quick", "default", "full")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ops", nargs="+", metavar="OP", help="these ops only")
    add("--backends", nargs="*", metavar="NAME", help="these backends only; without a name, none")
    add("--baselines", nargs="*", metavar="NAME", help="these baselines and marks only; without a name, none")
    add("--set", default="default", choices=SETS, help="which shapes (default: default)")
    add("--cases", nargs="+", metavar="TEXT", help="only cases whose key contains one of these texts")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--seconds", type=float, default=2.0, help="timing per case, all implementations together (default 2)")
    add("--limit", type=float, metavar="SECONDS", help="start no further case after this time; ops in turn")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--json", metavar="FILE", help="results file to add to (default build/bench/DEVICE.json)")
    add("--plots", metavar="DIR", help="draw plots of the results file into a folder")
    add("--check", action="store_true", help="run small cases once per backend and check them, untimed")
    add("--list", action="store_true", help="print the cases and stop")
    options = parser.parse_args(argv)
    if options.seconds <= 0:
        parser.error(f"--seconds: expected a number above 0, got {options.seconds:g}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    return options


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    # After this line torch may be imported: not before, libgomp reads its variables when it is loaded.
    restart_with_pinned_environment(argv, options.threads)
    return run(options, argv)


def run(options: argparse.Namespace, argv: list[str]) -> int:
    """Measure what the options select; see the module for the exit status."""
    import torch

    from bench import results
    from bench.registry import interleave, select
    from bench.session import check_all, measure_all

    pin_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32, for baselines and marks too
    try:
        device = torch.device(options.device)
        cases = select(options.ops, options.set, device.type, options.cases)
        if options.check and options.set != "tiny":
            cases = select(options.ops, "tiny", device.type, options.cases) + cases
        if not cases:
            raise ValueError("no case is selected")
        if not (options.list or device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())):
            raise ValueError(f"device: expected cpu or an available CUDA device, got {device}")
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(subject.key(case) for subject, case in cases))
        return 0
    if options.check:
        return check_all(cases, device, options.backends)
    path = Path(options.json) if options.json else ROOT / "build" / "bench" / f"{device.type}.json"
    try:
        status = measure_all(cases if options.limit is None else interleave(cases), path, device, argv, options)
    except results.ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.plots:
        from bench.plots import draw

        for drawn in draw(results.load(path), Path(options.plots), device.type):
            print(f"plot: {drawn}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
