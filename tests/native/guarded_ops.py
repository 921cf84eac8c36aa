"""Runs the compiled CPU ops with every tensor they are given at a guard page: `python -m tests.native.guarded_ops ISA`.

A program of its own, since an access out of bounds ends it (tests/native/test_guarded_ops.py reads how). Each native op
is called through the public ops and their backward passes, in sizes around the widths of vectors and blocks, twice:
with the tensors ending at guard pages and with them beginning at one. Prints each call before it is made.
"""

from __future__ import annotations

import faulthandler
import sys

import torch

import ztok_fast
from tests.native.guard_pages import SIDES, Guarded
from ztok_fast import native, ops
from ztok_fast.ops.op import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WITH_MATMUL = ("quantize_ragged_native",)  # rounding of torch's matrix product depends on where its operands lie
CALLED: set[str] = set()


class GuardedOp:
    """A native op of which every call is made with copies of its tensors at guard pages."""

    def __init__(self, op):
        self.op = op
        self._schema = getattr(op, "default", op)._schema
        self.name = self._schema.name.split("::")[1]
        self.default = self
        # tensors that the op writes: only these may differ after a call
        self.written = [i for i, a in enumerate(self._schema.arguments) if a.alias_info and a.alias_info.is_write]

    def __call__(self, *args):
        CALLED.add(self.name)
        print(self.name, *map(describe, args), flush=True)
        runs = [self.run(args, side) for side in SIDES]
        for i, (first, second) in enumerate(zip(*runs, strict=True)):
            if self.name in WITH_MATMUL:
                torch.testing.assert_close(first, second, equal_nan=True)
            else:
                assert torch.equal(bits(first), bits(second)), (
                    f"{self.name}: result {i} depends on where the tensors lie: {first} {second}"
                )
        for i in self.written:
            args[i].copy_(runs[0][-1 - self.written.index(i)])
        return self.result

    def run(self, args, side):
        held = []

        def place(value):
            if isinstance(value, (list, tuple)):
                return [place(v) for v in value]
            if not isinstance(value, torch.Tensor):
                return value
            held.append((value, Guarded(value.detach(), side)))
            return held[-1][1].tensor

        placed = place(args)
        before = [guarded.tensor.clone() for _, guarded in held]
        self.result = self.op(*placed)
        written = [placed[i] for i in self.written]
        for (_, guarded), was in zip(held, before):
            assert guarded.intact(), f"{self.name} writes out of bounds"
            assert any(guarded.tensor is w for w in written) or torch.equal(bits(guarded.tensor), bits(was)), self.name
        results = self.result if isinstance(self.result, (list, tuple)) else [self.result]
        return [r.clone() for r in results if isinstance(r, torch.Tensor)] + [w.clone() for w in written]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def describe(value):
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(describe, value))}]"
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else str(value)


def native_ops() -> set[str]:
    """Names of the library's ops that take tensors; those of the CUDA library alone are left out."""
    assert native.status("cpu").available, native.status("cpu").reason
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "ztok::" in name}
    return {n for n in names if "_native" in n and torch._C._dispatch_has_kernel_for_dispatch_key(f"ztok::{n}", "CPU")}


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def rows(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_(dtype.is_floating_point)


def backward(*results):
    results = [r for r in results if r.requires_grad]
    torch.autograd.backward(results, [torch.randn_like(r) for r in results])


def search(width, size, count, dtype):
    books = rows(2, size, width, dtype=dtype)
    for metric in ("l2", "cosine", "dot"):
        backward(ops.codebook_assign(rows(count, width, dtype=dtype), books, metric).distances)
    levels = torch.randint(0, 3, (count,), dtype=torch.int32)
    for used in (None, levels):
        backward(*ops.residual_quantize(rows(count, width, dtype=dtype), books, used)[1:4])


def halting(width, lengths, dtype):
    cu_seqlens, total = offsets(lengths), sum(lengths)
    for mode in ("fire", "stop"):
        units = ops.halting_units(torch.rand(total, requires_grad=True), cu_seqlens.int(), 1.0, mode)
        backward(ops.integrate_units(rows(total, width, dtype=dtype), units, total), units.weights)
        result = ops.quantize_ragged(
            rows(total, width, dtype=dtype), torch.rand(total, requires_grad=True), cu_seqlens,
            rows(7, width, dtype=dtype), rows(7, width, dtype=dtype), rows(2, 19, 7), None, 1.0, mode, total,
        )  # fmt: skip
        backward(result.quantized, result.latents, result.commitment, result.codebook_loss, result.units.weights)


def ragged(width, lengths, dtype):
    cu_seqlens, total = offsets(lengths), sum(lengths)
    padded = rows(len(lengths), max(lengths), width, dtype=dtype)
    backward(ops.ragged_pack(padded, cu_seqlens.int(), total))
    backward(ops.ragged_unpack(rows(total, width, dtype=dtype), cu_seqlens, max(lengths) + 1, 2.0))
    index = torch.randint(0, 5, (total,))
    sources = ([rows(total, width, dtype=dtype), rows(5, width, dtype=dtype)], [None, index], [cu_seqlens, cu_seqlens])
    backward(ops.ragged_gather(*sources).values)
    ops.ragged_layout([cu_seqlens.int()] * 3, [total] * 3)
    backward(ops.ragged_scatter_add(rows(total, width, dtype=dtype), index.int(), 5))


def lora(width, out, rank, count, dtype):
    arguments = (
        rows(count, width, dtype=dtype), rows(out, width, dtype=dtype), rows(out, dtype=dtype),
        rows(3, rank, width, dtype=dtype), rows(3, out, rank, dtype=dtype), torch.rand(3),
    )  # fmt: skip
    backward(ops.lora_linear(*arguments, torch.randint(-1, 3, (count,), dtype=torch.int32)))
    ends = torch.tensor([0, count // 2, count], dtype=torch.int32)
    backward(ops.lora_linear(*arguments, torch.tensor([2, 0], dtype=torch.int32), ends))


def zhead(width, size, count, dtype):
    for temperature, top_p in ((0.0, 1.0), (0.8, 1.0), (0.8, 0.7)):
        ids = torch.arange(count) + 5
        ops.z_select(
            rows(count, width, dtype=dtype).detach(),
            rows(size, width, dtype=dtype).detach(),
            temperature,
            top_p,
            3,
            ids,
        )
    tokens = torch.randint(-1, size, (count,))
    ops.token_scores(rows(count, width, dtype=dtype).detach(), rows(size, width, dtype=dtype).detach(), tokens)


def main(isa: int) -> None:
    faulthandler.enable()
    torch.manual_seed(0)
    wanted = native_ops()
    torch.ops.ztok.isa_native(isa)
    for name in wanted:
        setattr(torch.ops.ztok, name, GuardedOp(getattr(torch.ops.ztok, name)))
    for op in OPS.values():
        if any(backend.name == "cpp" for backend in op.backends):
            op._compiled = GuardedOp(op.default)
            wanted.add(op.name)
    with ztok_fast.backend("cpp"):
        for dtype in DTYPES:
            for width in (1, 3, 8, 15, 17, 33, 65):
                for count, size in ((1, 1), (3, 17), (37, 100)):
                    search(width, size, count, dtype)
                    zhead(width, size, count, dtype)
                    lora(width, size, 1 + size % 9, count, dtype)
                for lengths in ([1], [3, 0, 5], [17, 1, 2, 30]):
                    halting(width, lengths, dtype)
                    ragged(width, lengths, dtype)
            search(300, 131, 20, dtype)  # wide codes, not packed in float32
            search(65, 131, 1100, dtype)  # blocks of rows that threads share
    assert wanted == CALLED, f"never called: {wanted - CALLED}"
    print("done")


if __name__ == "__main__":
    main(int(sys.argv[1]))
