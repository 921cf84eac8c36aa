"""Every variant of the int8 products in a program of its own, under the address sanitizer; AMX in emulation too."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.test_simd import CMAKE, CPU, CXX, ROOT, X86, compile_cpu, isa_flags, shared_symbols

# the file's suffix -> its compiler flags beyond those of an instruction set
VARIANTS = {
    "avx2": ("avx2", []),
    "avx_vnni": ("avx2", ["-mavxvnni"]),
    "avx512": ("avx512", []),
    "avx512_vnni": ("avx512", ["-mavx512vnni"]),
}
AMX = ["-mamx-tile", "-mamx-int8"]

pytestmark = pytest.mark.skipif(CXX is None or not X86, reason="no C++ compiler was found, or not an x86 processor")


def compile_check(tmp_path: Path, name: str, *options: str) -> Path:
    program = tmp_path / "int8_check"
    source = [f'-DZTOK_SOURCE="int8_products_{name}.cpp"', f"-DZTOK_VARIANT=int8_products_{name}"]
    command = [CXX, "-std=c++17", "-O1", "-fsanitize=address", "-Wall", "-Wextra", "-Werror", "-Wno-uninitialized"]
    command += ["-Wno-maybe-uninitialized", f"-I{CPU}", f"-I{ROOT}/tests/native", *source, *options]
    result = subprocess.run(
        [*command, str(ROOT / "tests/native/int8_check.cpp"), "-o", str(program)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return program


def run(program: Path) -> None:
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


def processor_has(flags: list[str]) -> bool:
    names = {"-mavxvnni": "avx_vnni", "-mavx512vnni": "avx512_vnni"}
    cpuinfo = Path("/proc/cpuinfo")
    present = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    return all(names.get(flag, flag.removeprefix("-m")) in present for flag in flags)


@pytest.mark.parametrize("name", VARIANTS)
def test_products_are_exact(tmp_path, name):
    isa, more = VARIANTS[name]
    flags = [*isa_flags(isa), *more]
    program = compile_check(tmp_path, name, *flags)
    if not processor_has(flags):
        pytest.skip(f"compiled; this processor has no {name}")
    run(program)


def test_amx_products_are_exact_in_emulation(tmp_path):
    run(compile_check(tmp_path, "amx", '-DZTOK_AMX_EMULATION="amx_emulation.h"'))


def test_amx_compiles(tmp_path):
    source, target = CPU / "int8_products_amx.cpp", tmp_path / "amx.o"
    subprocess.run([CXX, "-std=c++17", "-O2", *AMX, f"-I{CPU}", "-c", source, "-o", target], check=True)
    listing = subprocess.run(["objdump", "-d", str(target)], capture_output=True, text=True, check=True).stdout
    assert "tdpbsud" in listing


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm was not found")
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_share_no_inline_functions(tmp_path, name):
    isa, more = VARIANTS[name]
    target = tmp_path / "variant.o"
    compile_cpu(CPU / f"int8_products_{name}.cpp", target, isa, *more, "-O0", "-c")
    assert shared_symbols(target, isa) == []


def test_the_build_uses_these_flags():
    for name, (isa, more) in VARIANTS.items():
        found = re.search(rf"int8_products_{name}\.cpp PROPERTIES\s+COMPILE_OPTIONS \"(.*)\"", CMAKE).group(1)
        assert f"${{ZTOK_FLAGS_{isa}}}" in found and all(flag in found for flag in more), name
