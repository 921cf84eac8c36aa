"""The CUDA kernels compile for every architecture that is shipped and stay in registers; no GPU needed.

What is checked of each kernel is in `tests/build/cuda_kernels.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.build.cuda_kernels import KERNELS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc/cuda"
TORCH_HEADERS = Path(torch.__file__).parent / "include"


def toolkit_program(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton's wheel brings some of them as well."""
    triton = importlib.util.find_spec("triton")
    bundled = [f"{folder}/backends/nvidia/bin" for folder in (triton.submodule_search_locations if triton else ())]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(["/usr/local/cuda/bin", *bundled]))


NVCC, CUOBJDUMP, CUFILT = (toolkit_program(name) for name in ("nvcc", "cuobjdump", "cu++filt"))
PTXAS_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
CASES = [
    pytest.param(kernel, arch, id=f"{kernel.name.removeprefix('ztok::').replace('ztok::', '')}-sm_{arch}")
    for kernel in KERNELS
    for arch in kernel.architectures
]

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")


class Compiled(NamedTuple):
    """What the toolkit says of one kernel."""

    resources: dict[str, str]
    code: str
    is_sass: bool


def normal(name: str) -> str:
    return re.sub(r"\s+", "", name)


def run(*command: str | Path) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def demangled(name: str) -> str:
    """Without return type and arguments. Demanglers disagree on blanks, so it is compared without any."""
    full = normal(run(CUFILT or "c++filt", name)).removeprefix("void")
    depth = 0
    for position, letter in enumerate(full):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return full[:position]
    return full


def nvcc(kind: str, source: Path, arch: str) -> tuple[Path, str]:
    target = source.with_suffix(f".{arch}.{kind}")
    # The flags of CMake's release build.
    includes = [f"-I{folder}" for folder in (SOURCES, ROOT / "csrc/common", TORCH_HEADERS)]
    options = ("-O3", "-DNDEBUG", "-std=c++17", f"-arch=sm_{arch}", *includes)
    return target, run(NVCC, *options, "-Xptxas=-v", f"-{kind}", source, "-o", target)


def split_code(text: str, entry: re.Pattern) -> dict[str, str]:
    """Mangled name -> code, from text in which `entry` matches the line that begins a kernel."""
    marks = list(entry.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return {mark.group(1): text[mark.end() : end] for mark, end in zip(marks, ends)}


@functools.cache
def compiled(header: str, arch: str) -> dict[str, Compiled]:
    """Compile all kernels of a header in one translation unit; normalised name -> what came of it."""
    names = [kernel.name for kernel in KERNELS if kernel.header == header and arch in kernel.architectures]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernels.cu")
        # Taking its address instantiates a kernel, whatever its parameters are.
        addresses = "".join(f"    reinterpret_cast<const void*>(&{name}),\n" for name in names)
        source.write_text(f'#include "{header}"\nextern const void* const kernels[] = {{\n{addresses}}};\n')
        cubin, log = nvcc("cubin", source, arch)
        resources = {match["name"]: match.groupdict() for match in PTXAS_ENTRY.finditer(log)}
        if CUOBJDUMP:
            code = split_code(run(CUOBJDUMP, "-sass", cubin), re.compile(r"Function : (\w+)"))
        else:
            code = split_code(nvcc("ptx", source, arch)[0].read_text(), re.compile(r"\.entry (\w+)\("))
    return {demangled(name): Compiled(resources[name], code[name], CUOBJDUMP is not None) for name in resources}


@pytest.mark.parametrize(("kernel", "arch"), CASES)
def test_kernel_stays_in_registers_and_uses_the_instructions_it_should(kernel, arch):
    found = compiled(kernel.header, arch)
    assert normal(kernel.name) in found, sorted(found)
    resources, code, is_sass = found[normal(kernel.name)]
    assert resources["arch"] == arch
    assert (resources["stack"], resources["stores"], resources["loads"]) == ("0", "0", "0"), resources
    assert int(resources["registers"]) <= kernel.registers, resources
    for instruction in kernel.instructions:
        pattern = instruction.sass if is_sass else instruction.ptx
        assert re.search(pattern, code), f"no {pattern} in\n{code}"


def test_every_kernel_is_in_the_table():
    defined = {
        name
        for path in SOURCES.glob("*.cu*")
        for name in re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", path.read_text())
    }
    assert defined == {re.search(r"(\w+)(<|$)", kernel.name)[1] for kernel in KERNELS}


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
    _, log = nvcc("cubin", source, "80")
    entry = PTXAS_ENTRY.search(log)
    assert entry is not None, log
    assert int(entry["stores"]) > 0 or int(entry["stack"]) > 0
