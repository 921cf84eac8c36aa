"""Compile every Triton kernel as the ops launch it, without a GPU: `python -m tests.ops.aot CAPABILITY [OP...]`.

The ops run on the samples and benchmark cases of their specifications, with tensors that have shapes and no memory.
Each launch of a kernel is recorded in place of being made: argument types, alignment and ones as Triton specialises on
them, constants, warps and stages. What is recorded is compiled for the architecture. So a new kernel or op needs
nothing here. Prints one JSON object per distinct launch: what ptxas reports, and the instructions looked for.

Of launches that differ in sizes alone the largest is compiled (`--set variants`), by default only the largest of each
kernel.

This is a program of its own because a process that interprets kernels (TRITON_INTERPRET) cannot compile them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import traceback
from dataclasses import dataclass
from unittest import mock

REPORT = {
    "registers": r"Used (\d+) registers",
    "stack": r"(\d+) bytes stack frame",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
}
INSTRUCTIONS = ("wgmma", "mma.sync", "tcgen05.mma")
ENGINE = "engine"
"""Not an op: the passes of `ztok_fast.engine` on a GPU."""
ARITHMETIC = re.compile(r"\b(?:fma|mad|mul|add|sub|div|sqrt|rsqrt|rcp|ex2)[\w.]*\.f(?:32|64)\b")
# a product of 16-bit numbers in Triton's own representation: rows and type of the left operand
PRODUCT = re.compile(r"tt\.dot .*?: tensor<(\d+)x\d+x(?:bf16|f16)")


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel, "module:function"; `name` is readable and unique."""

    op: str
    name: str
    kernel: str
    function: object
    signature: dict
    constexprs: dict
    attributes: dict
    options: dict

    @property
    def constants(self) -> dict:
        """The constants by their names."""
        return {list(self.signature)[at[0]]: value for at, value in self.constexprs.items()}

    @property
    def variant(self) -> tuple:
        """What tells it apart from other launches of the kernel, sizes left out."""
        kinds = {k: v if v is None or isinstance(v, (bool, str)) else type(v) for k, v in self.constants.items()}
        return self.kernel, *self.signature.items(), *kinds.items()

    @property
    def size(self) -> tuple:
        """Larger for wider rows and larger tiles, which spill first."""
        sizes = {k: v for k, v in self.constants.items() if isinstance(v, int)}
        return sizes.get("D", 0), sum(sizes.values()), self.name


class Recorder:
    """Replaces `JITFunction.run`: what is launched is kept, and nothing runs."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend

        self.target = GPUTarget("cuda", capability, 32)
        self.backend = make_backend(self.target)
        self.launches: dict[str, Launch] = {}
        self.op = ""

    def run(self, kernel, *args, grid, warmup, **kwargs):
        from triton.runtime.jit import create_function_from_signature

        binder = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        bound, specialization, _ = binder(*args, **kwargs)
        grid = grid(bound) if callable(grid) else grid
        name = f"{kernel.fn.__module__}:{kernel.__name__}"
        assert all(isinstance(size, int) and size > 0 for size in grid), f"{name} is launched on {grid}"
        _, signature, constexprs, attributes = kernel._pack_args(self.backend, kwargs, bound, specialization, None)
        options = {k: v for k, v in kwargs.items() if k not in signature}
        types = " ".join(f"{k}:{v}" for k, v in signature.items() if v != "constexpr")
        constants = " ".join(f"{list(signature)[k[0]]}={v}" for k, v in constexprs.items())
        aligned = ",".join(list(signature)[k[0]] for k, v in attributes.items() if v)
        text = f"{name.removesuffix('_kernel')} {types} | {constants} | {aligned} | {options}"
        launch = Launch(self.op, text, name, kernel, signature, constexprs, attributes, options)
        self.launches.setdefault(text, launch)


def record(capability: int, ops=()) -> list[Launch]:
    """All distinct launches of the ops, or of those named, and of their backward passes."""
    import torch
    from triton.runtime.jit import JITFunction

    import ztok_fast.ops  # noqa: F401 (declares the ops)
    from ztok_fast.ops.op import OPS

    recorder = Recorder(capability)
    with (
        mock.patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: recorder.run(kernel, *args, **kwargs)),
        mock.patch.object(torch, "is_autocast_enabled", lambda *_: False),  # knows no meta device
        torch.no_grad(),
    ):
        for name, op in OPS.items():
            if op.spec is not None and op.has("triton") and (not ops or name in ops):
                for sizes, dtype in inputs_of(op.spec):
                    recorder.op = name
                    with _launching(recorder):
                        op.spec.public(**make(op.spec, sizes, dtype))
        if not ops or ENGINE in ops:
            from tests.engine.gpu_launches import launch_all

            recorder.op = ENGINE
            launch_all()
    return list(recorder.launches.values())


def inputs_of(spec):
    """(sizes, dtype): all samples, all benchmark cases for GPUs, and the options of the samples at the cases' sizes."""
    cases = [case.sizes for case in spec.cases if "cuda" in case.devices]
    found = [*spec.samples, *cases, *({**sample, **sizes} for sample in spec.samples for sizes in cases)]
    for i, sizes in enumerate(found):
        if sizes not in found[:i]:
            for dtype in spec.dtypes:
                yield sizes, dtype


def make(spec, sizes, dtype):
    """Inputs on the meta device."""
    import torch
    from torch._subclasses import FakeTensorMode
    from torch._subclasses.fake_tensor import DataDependentOutputException

    try:
        with FakeTensorMode():
            inputs = spec.make(sizes, dtype, torch.Generator())
    except DataDependentOutputException:  # some inputs are made from values of others
        inputs = spec.make(sizes, dtype, torch.Generator())
    return _without_memory(inputs)


def _without_memory(value):
    import torch

    if isinstance(value, dict):
        return {k: _without_memory(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_without_memory(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _launching(recorder):
    """A mode in which each op, and its backward pass, launches its Triton backend if that takes the arguments."""
    import torch
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode

    from ztok_fast.ops.backends import load
    from ztok_fast.ops.op import OPS, _flatten

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            outputs = func(*args, **(kwargs or {}))
            op = OPS.get(func._schema.name.removeprefix("ztok::"))
            if op is None:
                return outputs
            args = args[:-1] if func is op.by_name else args
            tensors = [a for a in _flatten(args) if isinstance(a, Tensor)]
            floats = [t.dtype for t in tensors if t.is_floating_point()]
            for backend in op.backends:
                needs = backend.unmet(torch.device("cuda"), floats, args=args)
                if backend.name == "triton" and not list(needs):
                    if backend.contiguous:
                        args = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)
                    load(backend.implementation)(*args)
            if op.backward is not None:
                results = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
                grads = tuple(r.new_empty(r.shape) if r.is_floating_point() else None for r in results)
                with self:
                    op.backward(args, tuple(results), grads, [_needs(a) for a in args])
            return outputs

    return Mode()


def _needs(value):
    """Whether an argument can have a gradient; a list for a list."""
    if isinstance(value, (list, tuple)):
        return [_needs(v) for v in value]
    return hasattr(value, "is_floating_point") and value.is_floating_point()


def compile_launch(launch: Launch, target) -> dict:
    """Compile one launch and report on the code."""
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(launch.function, launch.signature, launch.constexprs, launch.attributes)
    # ptxas is called by Triton with -v; its log is what Triton prints when asked to
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=target, options=launch.options)
    found = {key: re.findall(pattern, log.getvalue()) for key, pattern in REPORT.items()}
    if not all(found.values()):
        raise ValueError(f"{launch.name}: ptxas gave no resource report: {log.getvalue()!r}")
    ptx = compiled.asm["ptx"]
    rows = [int(rows) for rows in PRODUCT.findall(compiled.asm["ttir"])]
    return {
        "kernel": launch.kernel,
        "op": launch.op,
        "name": launch.name,
        **{key: max(map(int, values)) for key, values in found.items()},
        "shared": compiled.metadata.shared,
        # what a warp group multiplies has 64 rows
        "wants_wgmma": bool(rows) and min(rows) >= 64 and launch.options["num_warps"] >= 4,
        "instructions": [i for i in INSTRUCTIONS if i in ptx],
        "arithmetic": sorted(set(ARITHMETIC.findall(ptx))),
        "target": re.search(r"\.target (\w+)", ptx)[1],
        "cubin_bytes": len(compiled.asm["cubin"]),
    }


def spilling() -> Launch:
    """The test of the test."""
    from tests.ops.aot_spills import spill_kernel

    signature = {"x": "*fp32", "y": "*fp32", "B": "constexpr"}
    return Launch("", "spills", "spill_kernel", spill_kernel, signature, {(2,): 64}, {}, {"num_warps": 1})


def largest(launches: list[Launch], of) -> list[Launch]:
    """The largest of the launches that `of` maps to the same."""
    found = {of(launch): launch for launch in sorted(launches, key=lambda launch: launch.size)}
    return list(found.values())


SETS = {
    "kernels": lambda launches: largest(launches, lambda launch: launch.kernel),
    "variants": lambda launches: largest(launches, lambda launch: launch.variant),
    "all": lambda launches: launches,
}


def main(argv: list[str] | None = None) -> None:
    """Record, compile and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.ops.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("capability", type=int, help="80, 90 or 100")
    parser.add_argument("ops", nargs="*", help="only the kernels of these ops, or of the engine")
    parser.add_argument("--set", choices=SETS, default="kernels", help="the largest launch of each, or all")
    parser.add_argument("--kernels", nargs="+", help="only kernels with these in their names")
    parser.add_argument("--list", action="store_true", help="print the launches and compile nothing")
    parser.add_argument("--spills", action="store_true", help="a kernel that must spill, and nothing else")
    arguments = parser.parse_args(argv)
    launches = [spilling()] if arguments.spills else record(arguments.capability, arguments.ops)
    launches = SETS[arguments.set](launches)
    if arguments.kernels:
        launches = [launch for launch in launches if any(name in launch.kernel for name in arguments.kernels)]
    if arguments.list:
        print(*sorted(launch.name for launch in launches), sep="\n")
        return
    from triton.backends.compiler import GPUTarget

    for launch in launches:
        try:
            print(json.dumps(compile_launch(launch, GPUTarget("cuda", arguments.capability, 32))), flush=True)
        except Exception:  # the others are compiled all the same; the test shows what is printed here
            print(f"{launch.name}:", file=sys.stderr)
            traceback.print_exc()


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main()
