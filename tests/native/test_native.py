"""`ztok_fast.native`: finding, loading and explaining the compiled parts."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import ztok_fast
from ztok_fast import doctor, native, sources
from ztok_fast.ops.op import OPS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def other_library_dir(tmp_path, monkeypatch):
    """The package as if its libraries lay in an empty folder, with nothing tried yet and no sources beside it."""
    monkeypatch.setattr(native, "LIBRARY_DIR", tmp_path)
    monkeypatch.setattr(sources, "CSRC", tmp_path / "csrc")
    # caches of their own: what this process has loaded stays loaded, and is not loaded again
    monkeypatch.setattr(native, "_load", functools.cache(native._load.__wrapped__))
    for op in OPS.values():
        monkeypatch.setattr(op, "_chosen", {})
    return tmp_path


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


STALE = "libztok_{}.so was built from other sources; run `make build`"


@pytest.fixture
def stale_library_dir(other_library_dir, monkeypatch):
    """Libraries that name other sources than those of the checkout. They would not load, so loading them shows."""
    monkeypatch.setattr(sources, "CSRC", ROOT / "csrc")
    for name in ("cpu", "cuda"):
        (other_library_dir / f"libztok_{name}.so").write_bytes(b"\x7fELF ztok_%s_sources=" % name.encode() + b"0" * 64)
    return other_library_dir


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_library_of_other_sources_is_not_loaded_and_warned_of_once(stale_library_dir, name):
    with pytest.warns(RuntimeWarning, match=STALE.format(name)) as told:
        part = native.status(name)
    assert not part.available and part.reason.startswith(STALE.format(name)) and len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.status(name) == part


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"ztok_cpu_sources=", b"ztok_cpu_sources=" + b"?" * 64])
def test_library_that_names_no_sources_is_of_other_sources(stale_library_dir, content):
    (stale_library_dir / "libztok_cpu.so").write_bytes(content)
    with pytest.warns(RuntimeWarning):
        assert native.status("cpu").reason.startswith(STALE.format("cpu"))


@pytest.mark.filterwarnings("ignore:ztok_fast. libztok")
def test_library_of_other_sources_shows_in_the_doctor_and_where_it_is_forced(stale_library_dir, monkeypatch):
    monkeypatch.delenv("ZTOK_BACKEND", raising=False)
    report = doctor.collect()
    assert f"no: {STALE.format('cpu')}" in doctor.render(report)
    entry = next(entry for entry in report["ops"] if "cpp" in entry["others"])
    assert entry["backend"] == "reference" and STALE.format("cpu") in entry["others"]["cpp"][0]
    monkeypatch.setattr(OPS["ragged_pack"], "_chosen", {})
    with ztok_fast.backend("cpp"), pytest.raises(ztok_fast.ops.BackendUnavailable, match=STALE.format("cpu")):
        ztok_fast.ops.ragged_pack(torch.zeros(1, 1), torch.tensor([0, 1]), 1)


def test_the_digest_follows_names_and_contents_of_sources(other_library_dir):
    (other_library_dir / "csrc" / "host").mkdir(parents=True)
    source = other_library_dir / "csrc" / "host" / "module.cpp"
    source.write_text("int f();\n")
    digests = {sources.digest("host")}
    source.write_text("int g();\n")
    digests.add(sources.digest("host"))
    source.rename(source.with_name("other.cpp"))
    digests.add(sources.digest("host"))
    assert len(digests) == 3
    (source.parent / "notes.txt").write_text("not a source")
    assert sources.digest("host") in digests
    assert sources.digest("cpu") is None


def test_the_build_is_given_the_digest(tmp_path):
    output = tmp_path / "sources.cpp"
    command = [sys.executable, "-I", sources.__file__, "cpu", str(output)]
    assert subprocess.run(command).returncode == 0
    assert sources.recorded("cpu", output) == sources.digest("cpu", ROOT / "csrc")


@pytest.mark.parametrize("name", native.PARTS)
def test_a_built_part_names_the_sources_of_the_checkout(name):
    part = native.status(name)
    if not part.path.is_file():
        pytest.skip(part.reason)
    assert sources.recorded(name, part.path) == sources.digest(name)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_loaded_library_registers_its_kernels(name):
    if not native.status(name).available:
        pytest.skip(f"{name}: {native.status(name).reason}")
    for op in OPS.values():
        if any(backend.compiled and backend.library == name for backend in op.backends):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ztok::{op.name}", name.upper())


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
