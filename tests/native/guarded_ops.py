"""Runs the compiled CPU ops with every tensor at a guard page: `python -m tests.native.guarded_ops ISA`.

A program of its own, since an access out of bounds ends it (tests/native/test_guarded_ops.py reads how). Every op with
a C++ kernel runs on the samples and the quick benchmark cases of its specification, in all dtypes, and so does its
backward pass. Each call of a kernel is made twice: with tensors that end at guard pages and with tensors that begin at
one; those that it is given and, where there is a C++ compiler, those that it makes. Prints each call before it is made.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ztok_fast
import ztok_fast.ops
from tests.native.guard_pages import SIDES, Guarded
from ztok_fast import native
from ztok_fast.ops.op import OPS

# torch's products round as their operands are aligned
WITH_MATMUL = ("quantize_ragged", "quantize_ragged_backward", "lora_linear", "lora_linear_backward")
CALLED: set[str] = set()


class GuardedKernel:
    """A compiled kernel of which every call is made with copies of its tensors at guard pages."""

    def __init__(self, op):
        self.kernel, self.name, self.default = op._compiled, op.name, op.default

    def __call__(self, *args):
        CALLED.add(self.name)
        print(self.name, *map(describe, args), flush=True)
        runs = [self.run(args, side) for side in SIDES]
        for i, (first, second) in enumerate(zip(*runs, strict=True)):
            if self.name in WITH_MATMUL and first.is_floating_point():
                torch.testing.assert_close(first, second, equal_nan=True)
            else:
                assert torch.equal(bits(first), bits(second)), (
                    f"{self.name}: result {i} depends on where the tensors lie: {first} {second}"
                )
        return self.result

    def run(self, args, side):
        held = []

        def place(value):
            if isinstance(value, (list, tuple)):
                return [place(v) for v in value]
            if not isinstance(value, torch.Tensor):
                return value
            held.append(Guarded(value.detach(), side))
            return held[-1].tensor

        placed = place(args)
        before = [guarded.tensor.clone() for guarded in held]
        with guarded_allocations(side):
            self.result = self.kernel(*placed)
        for guarded, was in zip(held, before):
            assert guarded.intact(), f"{self.name} writes out of bounds"
            assert torch.equal(bits(guarded.tensor), bits(was)), f"{self.name} writes into an argument"
        results = self.result if isinstance(self.result, (list, tuple)) else [self.result]
        return [r.clone() for r in results if isinstance(r, torch.Tensor)]


@functools.cache
def allocator() -> ctypes.CDLL | None:
    """tests/native/guard_allocator.cpp, compiled; None without a compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    root, library = Path(torch.__file__).parent, Path(tempfile.mkdtemp()) / "guard_allocator.so"
    command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", Path(__file__).with_name("guard_allocator.cpp")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    subprocess.run([*command, abi, f"-I{root}/include", f"-L{root}/lib", "-lc10", "-o", library], check=True)
    return ctypes.CDLL(str(library))


@contextmanager
def guarded_allocations(side):
    """Results and scratch tensors that are made in the block lie at guard pages too."""
    library = allocator()
    if library is None:
        yield
        return
    library.guard_allocations(int(side == "end"))
    try:
        yield
    finally:
        library.allocate_as_usual()


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def describe(value):
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(describe, value))}]"
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else str(value)


def compiled_ops() -> set[str]:
    """Names of the ops that take tensors and have a kernel of the CPU library."""
    assert native.status("cpu").available, native.status("cpu").reason
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ztok::") and "." not in name}
    return {
        name.removeprefix("ztok::")
        for name in names
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
        and any("Tensor" in str(a.type) for a in torch._C._get_schema(name, "").arguments)
    }


def inputs_of(op, dtype):
    """Keyword arguments of the public function; the differentiable ones are leaves that require a gradient."""
    quick = (case.sizes for case in op.spec.cases if case.set in ("tiny", "quick") and "cpu" in case.devices)
    for sizes in (*op.spec.samples, *quick):
        inputs = op.spec.make(sizes, dtype, torch.Generator().manual_seed(0))
        for name in op.spec.differentiable:
            inputs[name] = leaf(inputs[name])
        yield inputs


def leaf(value):
    if isinstance(value, (list, tuple)):
        return [leaf(v) for v in value]
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if floating else value


def backward(results):
    results = [r for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
    if results:
        torch.autograd.backward(results, [torch.randn_like(r) for r in results])


def run_engine(isa: int) -> None:
    """The engine's ops, which are no `Op`: a prompt of three rows beside one of 17, then a step, heads and draws."""
    from tests.engine.models import SIZES
    from ztok_fast.engine import Engine

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)
    for precision in ("int8", "float32"):
        torch.ops.ztok.isa_native(1)  # the engine refuses a processor without FMA, not a kernel that does without
        engine = Engine.from_model(model, None, precision, slots=2, capacity=32, cache=False)
        torch.ops.ztok.isa_native(isa)
        results = [run_engine_at(engine, side) for side in SIDES]
        for first, second in zip(*results, strict=True):
            assert torch.equal(bits(first), bits(second)), "the engine's results depend on where the tensors lie"


def run_engine_at(engine, side) -> list[torch.Tensor]:
    held = []

    def place(value):
        held.append(Guarded(value, side))
        return held[-1].tensor

    def ints(*values, dtype=torch.int32):
        return place(torch.tensor(values, dtype=dtype))

    def longs(*values):
        return ints(*values, dtype=torch.int64)

    weights, found = engine.weights, []
    blob, layout, embeddings = place(weights.blob), place(weights.layout), place(weights.embeddings)
    keys, values = place(torch.zeros_like(engine.keys)), place(torch.zeros_like(engine.values))
    width, slots, adapters = embeddings.shape[1], ints(1, 0), ints(0, 0)
    prompt = (longs(*range(3, 23)), None, longs(*range(3), *range(17)), ints(0, 3, 20), slots, ints(0, 0), adapters)
    vectors = place(torch.ones(2, width))
    step = (longs(5, -1), vectors, longs(3, 17), ints(0, 1, 2), slots, ints(3, 17), adapters)
    engine_ops = torch.ops.ztok
    with guarded_allocations(side):
        for name, rows in (("prompt", prompt), ("step", step)):
            print("engine", engine.precision, name, flush=True)
            hidden = engine_ops.engine_forward(blob, layout, keys, values, embeddings, *rows, engine.settings.layers)
            found.append(hidden.clone())
        hidden = place(hidden.clone())
        found.append(engine_ops.engine_logits(blob, layout, hidden, vectors).clone())
        found.append(engine_ops.engine_argmax(blob, layout, hidden, None).clone())
        draw = (0.7, 0.9, 3, longs(0, 1), longs(2, 2))
        found.append(engine_ops.engine_sample(blob, layout, hidden, vectors, *draw).clone())
        found += run_slots_at(place, longs)
    for guarded in held:
        assert guarded.intact(), "the engine writes out of bounds"
    CALLED.update(("engine_forward", "engine_logits", "engine_argmax", "engine_sample"))
    return found


def run_slots_at(place, longs) -> list[torch.Tensor]:
    """Z-tokens of slots, inside guarded allocations."""
    generator = torch.Generator().manual_seed(0)

    def floats(*sizes):
        return place(torch.randn(*sizes, generator=generator))

    found = [torch.ops.ztok.engine_draw(floats(3, 33), 0.9, 0.9, 3, longs(0, 1, 2), longs(1, 1, 1))]
    found.append(torch.ops.ztok.engine_weights(floats(3, 33), 1.0))
    codes = torch.tensor([[3, 40], [7, -1], [-1, -1]], dtype=torch.int32)
    offsets = torch.where(codes >= 0, torch.tensor([[0, 9]]), -1).int()
    index = place(codes.clamp(min=0).long())
    table, gates, places, empty = floats(41, 20), floats(2, 20), floats(5, 20), floats(20)
    found.append(torch.ops.ztok.engine_slot_rows(table, index, place(codes), place(offsets), gates, places, empty))
    CALLED.update(("engine_draw", "engine_weights", "engine_slot_rows"))
    return [own.clone() for own in found]


def main(isa: int) -> None:
    faulthandler.enable()
    torch.manual_seed(0)
    wanted = compiled_ops()
    torch.ops.ztok.isa_native(isa)
    variants = [i for i in range(6) if torch.ops.ztok.int8_isa_native(i) == i]
    for name in wanted & OPS.keys():
        OPS[name]._compiled = GuardedKernel(OPS[name])
    with ztok_fast.backend("cpp", ops=sorted(wanted & OPS.keys())):
        for op in OPS.values():
            if op.spec is not None and op.has("cpp"):
                dtypes = next(backend.dtypes for backend in op.backends if backend.name == "cpp")
                for dtype in op.spec.dtypes:
                    if dtype in dtypes:
                        for variant in variants if op.name == "int8_linear" else (-1,):
                            torch.ops.ztok.int8_isa_native(variant)
                            for inputs in inputs_of(op, dtype):
                                backward(op.spec.outputs(op.spec.public(**inputs)))
    run_engine(isa)
    assert wanted == CALLED, f"never called: {wanted - CALLED}"
    print("done")


if __name__ == "__main__":
    main(int(sys.argv[1]))
