"""The CUDA kernels of the LoRA decode path, run on the host thread by thread (`cuda_host/host_emulation.h`).

This shows what they compute, that no barrier is missing and that nothing outside the tensors is touched, without a GPU.
What only a GPU shows (the machine's own tensor cores, memory ordering between blocks, graph capture) is tested in
tests/ops where there is one.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.native.guard_pages import SIDES, Guarded, guard
from tests.ops.tolerances import assert_close

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent / "cuda_host"
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
H100 = 132  # multiprocessors


def cuda_headers() -> Path | None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    candidates = [Path("/usr/local/cuda/include")]
    if nvcc:
        said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        top = re.search(r"TOP=(\S+)", said)
        candidates += [Path(top[1], "include")] if top else []
    return next((folder for folder in candidates if (folder / "cuda_bf16.h").is_file()), None)


COMPILER = shutil.which("g++")
HEADERS = cuda_headers()
pytestmark = pytest.mark.skipif(not (COMPILER and HEADERS), reason="needs g++ and the headers of a CUDA toolkit")


class Arguments(ctypes.Structure):
    POINTERS = ("bias", "A", "B", "scaling", "adapters", "cu_seqlens")
    SIZES = ("sequences", "rows", "num_adapters", "rank", "in_", "out")
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        ("y", ctypes.c_void_p),
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("lora_decode") / "lora_decode.so"
    # -O1 keeps the compiler quick; no contraction into fma, so that sums round as they are written.
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    options += ["-Wno-unknown-pragmas", "-Wno-unused-parameter"]
    folders = [f"-I{ROOT / 'csrc/cuda'}", f"-I{HERE}", "-isystem", str(HEADERS)]
    command = [COMPILER, *options, *folders, str(HERE / "lora_decode.cpp"), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = ctypes.CDLL(str(target))
    loaded.lora_decode_on_host.restype = ctypes.c_int64
    return loaded


def layer(rows, width, out, num_adapters=3, rank=8, dtype=torch.bfloat16, adapter_dtype=None, bias=True):
    adapter_dtype = adapter_dtype or dtype
    return {
        "x": torch.randn(rows, width).to(dtype),
        "weight": (torch.randn(out, width) / width**0.5).to(dtype),
        "bias": torch.randn(out).to(dtype) if bias else None,
        "A": (torch.randn(num_adapters, rank, width) / width**0.5).to(adapter_dtype),
        "B": (torch.randn(num_adapters, out, rank) / rank**0.5).to(adapter_dtype),
        "scaling": torch.tensor([2.0, 0.5, -1.0])[:num_adapters].contiguous(),
        "adapters": torch.randint(-1, num_adapters, (rows,), dtype=torch.int32),
        "cu_seqlens": None,
    }


def row_adapters(adapters, cu_seqlens, rows):
    if adapters is None:
        return torch.zeros(rows, dtype=torch.int64)
    return adapters.long() if cu_seqlens is None else adapters.long().repeat_interleave(cu_seqlens.diff())


def expected(x, weight, bias, A, B, scaling, adapters, cu_seqlens):
    """In float64."""
    y = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    chosen = row_adapters(adapters, cu_seqlens, x.shape[0])
    for i in range(A.shape[0]):
        low_rank = scaling[i].double() * (x.double() @ A[i].double().T) @ B[i].double().T
        y = torch.where((chosen == i)[:, None], y + low_rank, y)
    return y


def run(library, arguments, **options):
    """Run both kernels, with every tensor ending at a guard page and then with every one beginning at one.

    Tensors that lie off 16 bytes are also used as they lie. All runs must give the same bits. Returns the output and
    the splits of the input.
    """
    off = any(t is not None and t.data_ptr() % 16 for t in arguments.values())
    (y, splits), *others = (run_guarded(library, arguments, side, **options) for side in (*SIDES, *[None] * off))
    assert all(torch.equal(y.view(torch.uint8), again.view(torch.uint8)) for again, _ in others)
    return y, splits


def run_guarded(library, arguments, side, row_tiles=None, aligned=None, splits=0, multiprocessors=H100, seed=0):
    """`row_tiles` and `aligned` default to what the launcher would choose for the tensors given."""
    x, weight, A, B = (arguments[name] for name in ("x", "weight", "A", "B"))
    vector = 16 // x.element_size()
    if aligned is None:
        aligned = x.shape[1] % vector == 0 and all(t.data_ptr() % 16 == 0 for t in (x, weight, A))
    if row_tiles is None:
        row_tiles = next(tiles for tiles in (1, 2, 4, 8) if x.shape[0] <= 8 * tiles)
    aligned_B = B.data_ptr() % 16 == 0 and A.shape[1] % 8 == 0
    held = {name: t if t is None or side is None else guard(t, side) for name, t in arguments.items()}
    x, weight, A, B, cu_seqlens = (held[name] for name in ("x", "weight", "A", "B", "cu_seqlens"))
    rows, out = x.shape[0], weight.shape[0]
    y = Guarded(torch.full((rows, out), torch.nan, dtype=x.dtype), side or "end")
    pointers = {name: held[name].data_ptr() for name in Arguments.POINTERS if held[name] is not None}
    assert all(held[name] is None or held[name].is_contiguous() for name in Arguments.POINTERS)
    filled = Arguments(
        x=x.data_ptr(), x_stride=x.stride(0), weight=weight.data_ptr(), weight_stride=weight.stride(0), **pointers,
        sequences=0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, rows=rows, num_adapters=A.shape[0],
        rank=A.shape[1], in_=x.shape[1], out=out, y=y.tensor.data_ptr(),
    )  # fmt: skip
    fault = ctypes.c_uint64()

    def call(scratch):
        return library.lora_decode_on_host(
            ctypes.byref(filled), DTYPES[x.dtype], A.dtype == torch.float32,
            cu_seqlens is not None and cu_seqlens.dtype == torch.int64, aligned, aligned_B, row_tiles,
            multiprocessors, splits, ctypes.c_void_p(scratch.data_ptr()), ctypes.c_int64(scratch.numel()), seed,
            ctypes.byref(fault),
        )  # fmt: skip

    scratch = Guarded(torch.full((-call(torch.empty(0)),), torch.nan), side or "end")
    used = call(scratch.tensor)
    places = {**held, "y": y.tensor, "scratch": scratch.tensor}
    assert fault.value == 0, f"access {describe(fault.value, places)}; side at the guard page: {side}"
    assert used > 0 and y.intact() and scratch.intact()
    return y.tensor.clone(), used


def describe(address, tensors):
    """Where an address lies, in bytes from the nearest tensor."""
    distances = {}
    for name, t in tensors.items():
        if t is not None:
            begin = t.data_ptr()
            end = begin + t.element_size() * (1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride())))
            distances[name] = address - end if address >= end else begin - address
    name = min(distances, key=distances.get)
    where = "behind the end" if address >= tensors[name].data_ptr() else "before the beginning"
    return f"{distances[name]} bytes {where} of {name}"


def check(library, arguments, **options):
    y, splits = run(library, arguments, **options)
    assert_close(y, expected(**arguments), scale=2.0)
    return splits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 9, 23, 32, 33, 64])
def test_every_number_of_rows(library, dtype, rows):
    check(library, layer(rows, width=96, out=40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "out"), [(8, 1), (264, 32), (1544, 33)])
def test_sizes_that_no_tile_divides(library, dtype, width, out):
    check(library, layer(5, width, out, dtype=dtype), splits=1)


@pytest.mark.parametrize("rank", [1, 3, 4, 8, 20, 72, 256])
def test_ranks(library, rank):
    check(library, layer(6, 64, 40, rank=rank))
    check(library, layer(9, 64, 40, rank=rank, adapter_dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 20, 50])
def test_split_input(library, dtype, rows):
    arguments = layer(rows, width=520, out=40, dtype=dtype)
    whole, _ = run(library, arguments, splits=1)
    for splits in (2, 7):
        y, _ = run(library, arguments, splits=splits)
        assert_close(y, expected(**arguments), scale=2.0)
        assert_close(y, whole.double(), scale=2.0)


def test_the_plan_splits_narrow_layers_only(library):
    assert check(library, layer(4, width=4096, out=64), multiprocessors=H100) > 1
    assert check(library, layer(4, width=256, out=64), multiprocessors=1) == 1


def test_neither_the_order_of_blocks_nor_of_threads_matters(library):
    arguments = layer(20, width=520, out=70, rank=12)
    first, _ = run(library, arguments, splits=3, seed=1)
    for seed in range(2, 4):
        assert torch.equal(run(library, arguments, splits=3, seed=seed)[0], first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 33), (9, 100)])
def test_unaligned_rows(library, dtype, rows, width):
    check(library, layer(rows, width, out=37, dtype=dtype), aligned=False)


def test_pointers_off_16_bytes(library):
    arguments = layer(9, width=64, out=40)
    for name in ("x", "weight", "A", "B", "bias"):
        shape = arguments[name].shape
        shifted = torch.empty(arguments[name].numel() + 1, dtype=arguments[name].dtype)[1:].view(shape)
        arguments[name] = shifted.copy_(arguments[name])
    check(library, arguments)


def test_strided_rows(library):
    arguments = layer(9, width=64, out=40)
    arguments["x"] = torch.randn(9, 96).bfloat16()[:, 16:80]
    arguments["weight"] = (torch.randn(40, 72) / 8).bfloat16()[:, :64]
    check(library, arguments)


@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64], ids=str)
def test_adapters_of_sequences(library, offset_dtype):
    arguments = layer(12, width=64, out=40)
    arguments["cu_seqlens"] = torch.tensor([0, 3, 3, 8, 12], dtype=offset_dtype)
    arguments["adapters"] = torch.tensor([2, 1, -1, 0], dtype=torch.int32)
    check(library, arguments)


@pytest.mark.parametrize("rows", [2, 13])
def test_one_adapter_or_none(library, rows):
    arguments = {**layer(rows, width=64, out=40, num_adapters=1, bias=False), "adapters": None}
    check(library, arguments)
    for adapter in (-1, 0):
        arguments["adapters"] = torch.full((rows,), adapter, dtype=torch.int32)
        check(library, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [4, 40])
def test_rows_do_not_see_other_adapters(library, dtype, rows):
    arguments = layer(rows, width=64, out=40, dtype=dtype)
    arguments["adapters"] = torch.arange(rows, dtype=torch.int32) % 2 * 2  # 0, 2, 0, 2, ...
    arguments["adapters"][1] = -1
    clean, _ = run(library, arguments)
    for name in ("A", "B"):
        arguments[name][1] = torch.nan
    assert torch.equal(run(library, arguments)[0], clean)
    arguments["x"][0] = torch.nan
    y, _ = run(library, arguments)
    assert y[0].isnan().all() and torch.equal(y[1:], clean[1:])


@pytest.mark.parametrize("bad", [-2, 3])
def test_an_adapter_out_of_range_counts_as_none(library, bad):
    arguments = layer(5, width=64, out=40)
    arguments["adapters"][2] = bad
    y, _ = run(library, arguments)
    arguments["adapters"][2] = -1
    assert_close(y, expected(**arguments), scale=2.0)


def test_offsets_that_do_not_cover_the_rows(library):
    arguments = layer(9, width=64, out=40)
    arguments["adapters"] = torch.tensor([1, 0], dtype=torch.int32)
    arguments["cu_seqlens"] = torch.tensor([2, 4, 6], dtype=torch.int32)
    y, _ = run(library, arguments)
    arguments["cu_seqlens"] = None
    arguments["adapters"] = torch.tensor([-1, -1, 1, 1, 0, 0, -1, -1, -1], dtype=torch.int32)
    assert_close(y, expected(**arguments), scale=2.0)


def test_large_low_rank_products_do_not_overflow(library):
    """x Aᵀ beyond the range of float16 stays finite on its way to B."""
    arguments = layer(4, width=64, out=40, num_adapters=1, dtype=torch.float16)
    arguments["adapters"] = None
    arguments["A"] *= 3e4
    arguments["B"] *= 1e-4
    assert (arguments["x"].float() @ arguments["A"][0].float().T * 2).abs().max() > 65504
    check(library, arguments)


def test_the_emulation_sees_a_missing_barrier(tmp_path):
    """Neighbours exchange values through shared memory without a barrier: the order of the threads shows."""
    source = tmp_path / "race.cpp"
    source.write_text(
        "#define ZTOK_HOST_EMULATION\n"
        '#include "device.cuh"\n'
        "template <bool kBarrier> void kernel(float* out) {\n"
        "  float* shared = ztok::shared_floats();\n"
        "  shared[threadIdx.x] = threadIdx.x;\n"
        "  if (kBarrier) __syncthreads();\n"
        "  out[threadIdx.x] = shared[(threadIdx.x + 1) % 64];\n"
        "}\n"
        'extern "C" void race(bool barrier, float* out) {\n'
        "  ztok::host::launch(dim3(1), dim3(64), 256, 1, [&] { barrier ? kernel<true>(out) : kernel<false>(out); });\n"
        "}\n"
    )
    target = tmp_path / "race.so"
    folders = [f"-I{ROOT / 'csrc/cuda'}", f"-I{HERE}", "-isystem", str(HEADERS)]
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    subprocess.run([COMPILER, *options, *folders, str(source), "-o", str(target)], check=True)
    out = torch.zeros(64)
    for barrier in (True, False):
        ctypes.CDLL(str(target)).race(barrier, ctypes.c_void_p(out.data_ptr()))
        assert bool(out.isfinite().all()) == barrier
