"""`ztok_fast.native`: finding, loading and explaining the compiled parts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from ztok_fast import native


@pytest.fixture
def other_library_dir(tmp_path, monkeypatch):
    """The package as if its libraries lay in an empty folder, with nothing tried yet."""
    monkeypatch.setattr(native, "LIBRARY_DIR", tmp_path)
    native._load.cache_clear()
    yield tmp_path
    native._load.cache_clear()


@pytest.mark.parametrize("name", native.PARTS)
def test_a_part_is_available_or_says_why_not(name):
    part = native.status(name)
    assert part.available == part.path.is_file()
    assert part.available == (part.reason == "")


def test_unknown_part():
    with pytest.raises(ValueError, match="name: expected one of cpu, cuda, host, got 'gpu'"):
        native.status("gpu")


def test_build_record_matches_what_is_there():
    record = json.loads((native.LIBRARY_DIR / "build.json").read_text())
    for name, entry in record["parts"].items():
        assert entry["built"] == native.status(name).available, (name, entry, native.status(name))


def test_build_info_is_json():
    info = json.loads(json.dumps(native.build_info()))
    assert set(info["parts"]) == set(native.PARTS)
    assert (info["host_compiler"] is not None) == info["parts"]["host"]["available"]


def test_importing_loads_nothing():
    code = "import sys; from ztok_fast import native; sys.exit(native._load.cache_info().currsize)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_missing_library_without_a_build(other_library_dir):
    reason = "not built: the package was installed without its build step (run `make build`)"
    assert native.status("cpu").reason == reason


def test_missing_library_repeats_the_reason_of_the_build(other_library_dir):
    record = {"parts": {"cuda": {"built": False, "reason": "nvcc was not found"}, "cpu": {"built": True, "reason": ""}}}
    (other_library_dir / "build.json").write_text(json.dumps(record))
    assert native.status("cuda").reason == "not built: nvcc was not found"
    assert native.status("cpu").reason == "built, but the file is gone (run `make build`)"


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_damaged_build_record_is_no_record(other_library_dir, text):
    (other_library_dir / "build.json").write_text(text)
    assert native.build_info()["torch"] is None
    assert "without its build step" in native.status("cpu").reason


def test_library_that_does_not_load(other_library_dir):
    (other_library_dir / "libztok_cpu.so").write_bytes(b"not a library")
    part = native.status("cpu")
    assert not part.available
    assert part.reason.startswith("libztok_cpu.so does not load: ")


def test_cuda_library_needs_the_cpu_library(other_library_dir):
    (other_library_dir / "libztok_cuda.so").write_bytes(b"")
    assert "needs the schemas of the CPU library" in native.status("cuda").reason


RAGGED = [
    *(f"ragged_{op}_native" for op in ("pack", "unpack", "layout", "gather", "gather_backward", "scatter_add")),
    *(f"ragged_{op}_native_out" for op in ("pack", "unpack", "gather", "scatter_add")),
]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_loaded_library_registers_its_kernels(name):
    if not native.status(name).available:
        pytest.skip(f"{name}: {native.status(name).reason}")
    for op in RAGGED:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ztok::{op}", name.upper())


def test_instruction_set_can_be_chosen_and_an_absent_one_is_refused():
    if not native.status("cpu").available:
        pytest.skip(native.status("cpu").reason)
    isa = torch.ops.ztok.isa_native
    best = isa(-1)
    try:
        assert isa(0) == 0 and isa(-1) == 0
        assert isa(best) == best
        assert isa(99) == best and (best == 2 or isa(2) == best)
    finally:
        isa(best)
