"""csrc/cpu/simd.h and the rules of kernel files, by compiling small programs; no build of the package is needed."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc/cpu"
CXX = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
X86 = platform.machine() in ("x86_64", "AMD64")
CMAKE = (ROOT / "CMakeLists.txt").read_text()


def isa_flags(isa: str) -> list[str]:
    """The compiler flags that CMakeLists.txt gives an instruction set."""
    if isa == "baseline":
        return []
    flags = re.search(rf"set\(ZTOK_FLAGS_{isa} (.*)\)", CMAKE).group(1).split()
    return [part for flag in flags for part in (isa_flags("avx2") if flag == "${ZTOK_FLAGS_avx2}" else [flag])]


def has(isa: str) -> bool:
    """Whether this processor runs code of an instruction set."""
    if isa == "baseline":
        return True
    cpuinfo = Path("/proc/cpuinfo")
    present = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    return all(flag.removeprefix("-m") in present for flag in isa_flags(isa))


ISAS = ["baseline", "avx2", "avx512"] if X86 else ["baseline"]
KERNELS = sorted(path.relative_to(ROOT).as_posix() for path in CPU.glob("*_kernel.cpp"))
assert KERNELS

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler was found")


def compile_cpu(source: Path, target: Path, isa: str, *options: str) -> None:
    definitions = [f"-DZTOK_ISA={isa}", *(["-DZTOK_X86_KERNELS"] if X86 else [])]
    command = [CXX, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", *isa_flags(isa), *definitions]
    command += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12's AVX-512 header sets them off
    command += [f"-I{CPU}", *options, str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("isa", ISAS)
def test_operations(tmp_path, isa):
    program = tmp_path / "simd_check"
    compile_cpu(ROOT / "tests/native/simd_check.cpp", program, isa, "-O2")
    if not has(isa):
        pytest.skip(f"compiled; this processor has no {isa}")
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def shared_symbols(kernel_object: Path, isa: str) -> list[str]:
    """Symbols of which the linker keeps one copy for all object files, other than those of the instruction set."""
    listing = subprocess.run(["nm", "-C", str(kernel_object)], capture_output=True, text=True, check=True).stdout
    weak = [line.split(maxsplit=2)[2] for line in listing.splitlines() if re.match(r"[0-9a-f]+ [WVu] ", line)]
    # DW.ref.*: the address of the C++ runtime's handler of exceptions, which is no code
    return [name for name in weak if f"ztok::{isa}::" not in name and not name.startswith("DW.ref.")]


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm was not found")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_share_no_inline_functions(tmp_path, kernel, isa):
    # unoptimised, every inline function that is called is there to be seen
    compile_cpu(ROOT / kernel, tmp_path / "kernel.o", isa, "-O0", "-c")
    assert shared_symbols(tmp_path / "kernel.o", isa) == []


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm was not found")
def test_shared_inline_functions_would_be_seen(tmp_path):
    source = tmp_path / "bad_kernel.cpp"
    source.write_text("#include <algorithm>\nint f(const int* p) { return std::max(p[0], p[1]); }\n")
    compile_cpu(source, tmp_path / "bad.o", "baseline", "-O0", "-c")
    assert any("std::max" in name for name in shared_symbols(tmp_path / "bad.o", "baseline"))
