"""What the tests with guard pages rest on: an access out of bounds is seen, one inside is not."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.native.guard_pages import SIDES, Guarded

CXX = shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler was found")


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    source = folder / "probe.cpp"
    source.write_text(
        '#include "faults.h"\n'
        'extern "C" unsigned long read_byte(const volatile char* p) {\n'
        "  return ztok::host::faulting_address([&] { (void)*p; });\n"
        "}\n"
        'extern "C" unsigned long write_byte(volatile char* p) {\n'
        "  return ztok::host::faulting_address([&] { *p = 1; });\n"
        "}\n"
    )
    library = folder / "probe.so"
    command = [CXX, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{Path(__file__).parent}", str(source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for function in (loaded.read_byte, loaded.write_byte):
        function.argtypes, function.restype = (ctypes.c_void_p,), ctypes.c_ulong
    return loaded


@needs_compiler
@pytest.mark.parametrize("access", ["read_byte", "write_byte"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("elements", [1, 7, 2048, 5000])
def test_a_byte_beyond_the_guarded_side_faults(probe, access, side, elements):
    held = Guarded(torch.zeros(elements, dtype=torch.float16), side)
    first = held.tensor.data_ptr()
    behind = first + 2 * elements
    touch = getattr(probe, access)
    assert touch(first) == touch(behind - 1) == 0
    beyond = behind if side == "end" else first - 1
    assert touch(beyond) == beyond
    assert touch(0) == 1
    assert touch(first) == 0  # a fault that was reported does not keep the next from being


@needs_compiler
@pytest.mark.parametrize("side", SIDES)
def test_a_write_beyond_the_other_side_is_seen(probe, side):
    held = Guarded(torch.zeros(5), side)
    assert held.intact()
    probe.write_byte(held.tensor.data_ptr() + (-1 if side == "end" else 20))
    assert not held.intact()


@pytest.mark.parametrize("side", SIDES)
def test_the_copy_is_the_tensor(side):
    for tensor in (torch.randn(3, 5), torch.randn(4, 9)[:, 2:7], torch.randn(3, 4).T, torch.zeros(0, 3)):
        held = Guarded(tensor, side).tensor
        assert torch.equal(held, tensor) and held.stride() == tensor.stride()
