"""Runs and checks every op once per backend on small shapes, untimed: what compute-sanitizer is put around.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.once --device cuda

Exit status 1 when a backend was wrong or raised.
"""

from __future__ import annotations

import argparse
import sys

import torch

from bench.registry import select
from bench.runner import backends_of, gradient_mode, verify


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.once", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ops", nargs="+", help="these ops only")
    parser.add_argument("--backends", nargs="+", help="these backends only (default: all but the reference)")
    parser.add_argument("--set", default="default", help="largest set of which small cases are taken")
    parser.add_argument("--mflop", type=float, default=100, help="only cases of at most so many million operations")
    parser.add_argument("--megabytes", type=float, default=20, help="and of at most so many bytes read and written")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    ran = red = 0
    for name in dict.fromkeys(("tiny", options.set)):
        for subject, case in select(options.ops, name, device.type):
            inputs = subject.make(case, torch.Generator(device).manual_seed(1))
            work = subject.work(case, inputs)
            if name != "tiny" and (work.flops > 1e6 * options.mflop or work.bytes > 1e6 * options.megabytes):
                continue
            with gradient_mode(case):
                for own in backends_of(subject, case, [inputs], device, options.backends):
                    if own.calls and (options.backends is not None or own.name != "reference"):
                        verify(own, subject, case, [inputs])
                        ran += 1
                        if own.status != "ok":
                            red += 1
                            print(f"{subject.key(case)}: {own.name}: {own.status}: {own.reason}", file=sys.stderr)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} runs of backends, {red} red")
    return int(red > 0)


if __name__ == "__main__":
    raise SystemExit(main())
