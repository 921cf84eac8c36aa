"""Runs and checks every op once per backend on small shapes, untimed: what compute-sanitizer is put around.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.micro.once --device cuda

Exit status 1 when a backend was wrong or raised.
"""

from __future__ import annotations

import argparse
import sys

import torch

from bench.micro.registry import OPS, select
from bench.micro.runner import backend_entrants, gradient_mode, verify


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.micro.once", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ops", nargs="+", help="these ops only")
    parser.add_argument("--backends", nargs="+", help="these backends only (default: all but the reference)")
    parser.add_argument(
        "--set", default="default", help="largest set of which small cases are taken (default: default)"
    )
    parser.add_argument("--mflop", type=float, default=100, help="only cases of at most so many million operations")
    parser.add_argument("--megabytes", type=float, default=20, help="and of at most so many bytes read and written")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    cases = select(options.ops, "tiny", device.type)
    if options.set != "tiny":
        cases += select(options.ops, options.set, device.type)
    ran = red = 0
    for case in cases:
        op = OPS[case.op]
        inputs = op.make(case, device, torch.Generator(device).manual_seed(1))
        work = op.work(case, inputs)
        if case.set != "tiny" and (work.flops > 1e6 * options.mflop or work.bytes > 1e6 * options.megabytes):
            continue
        with gradient_mode(case):
            for entrant in backend_entrants(op, case, [inputs], device, options.backends):
                if not entrant.calls or (options.backends is None and entrant.name == "reference"):
                    continue
                verify(entrant, lambda i, found: op.check(case, inputs, found))
                ran += 1
                if entrant.status != "ok":
                    red += 1
                    print(f"{case.key}: {entrant.name}: {entrant.status}: {entrant.reason}", file=sys.stderr)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} runs of backends, {red} red")
    return int(red > 0)


if __name__ == "__main__":
    raise SystemExit(main())
