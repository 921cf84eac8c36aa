"""The CUDA sources compile for every architecture that is shipped, and the kernels stay in registers; no GPU needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = ["80", "90a"]
PTXAS_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
# The instantiations that ragged.cu launches, with the widest and the narrowest unit among them.
KERNEL_SOURCE = """
#include "ragged_kernel.cuh"
#define INSTANTIATE(Unit, Offset) \\
  template __global__ void ztok::ragged_pack_kernel<Unit, Offset>( \\
      const Unit*, const Offset*, Unit*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
INSTANTIATE(uint4, int32_t)
INSTANTIATE(uint4, int64_t)
INSTANTIATE(uint32_t, int32_t)
INSTANTIATE(uint8_t, int64_t)
"""

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")


def compile_cubin(source: Path, arch: str, *options: str) -> tuple[Path, str]:
    cubin = source.with_suffix(f".{arch}.cubin")
    command = [NVCC, "-O3", "-std=c++17", "-cubin", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc/cuda'}", *options]
    result = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return cubin, result.stderr


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_use_neither_local_memory_nor_spills(tmp_path, arch):
    source = tmp_path / "kernels.cu"
    source.write_text(KERNEL_SOURCE)
    cubin, log = compile_cubin(source, arch, "-Xptxas=-v")
    assert cubin.stat().st_size > 0
    entries = [match.groupdict() for match in PTXAS_ENTRY.finditer(log)]
    assert len(entries) == KERNEL_SOURCE.count("INSTANTIATE(u"), log
    for entry in entries:
        assert entry["arch"] == arch
        assert (entry["stack"], entry["stores"], entry["loads"]) == ("0", "0", "0"), entry
        # 64 registers let 4 blocks of 256 threads run on one multiprocessor.
        assert int(entry["registers"]) <= 64, entry


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_wide_unit_moves_16_bytes_at_once(tmp_path, arch):
    source = tmp_path / "kernels.cu"
    source.write_text(KERNEL_SOURCE)
    ptx = tmp_path / "kernels.ptx"
    command = [NVCC, "-O3", "-std=c++17", "-ptx", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc/cuda'}", str(source)]
    subprocess.run([*command, "-o", str(ptx)], check=True, capture_output=True)
    entries = ptx.read_text().split(".visible .entry")[1:]
    wide = [entry for entry in entries if "5uint4" in entry.split("(")[0]]
    assert len(wide) == 2
    for entry in wide:
        assert re.search(r"ld\.global[.\w]*\.v4\.\w32", entry) and re.search(r"st\.global[.\w]*\.v4\.\w32", entry)


def test_spill_detection_sees_spills(tmp_path):
    """The check above would notice: the same report for a kernel that must spill."""
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spills(float* x) {\n"
        "  float v[64];\n"
        "  for (int i = 0; i < 64; ++i) v[i] = x[i * 32 + threadIdx.x];\n"
        "  for (int r = 0; r < 9; ++r)\n"
        "    for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i * 7 + r) % 64] + v[(i + 1) % 64];\n"
        "  for (int i = 0; i < 64; ++i) x[i * 32 + threadIdx.x] = v[i];\n"
        "}\n"
    )
    _, log = compile_cubin(source, "80", "-Xptxas=-v")
    entry = PTXAS_ENTRY.search(log)
    assert entry is not None, log
    assert int(entry["stores"]) > 0 or int(entry["stack"]) > 0
