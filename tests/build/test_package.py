"""Metadata that other files rely on, and the install where there is no compiler, which says so and works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest there

ROOT = Path(__file__).resolve().parents[2]
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(lines: list[str]) -> set[str]:
    """Normalised project names of requirement lines; options and comments are left out."""
    found = (re.match(r"[A-Za-z0-9][\w.-]*", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", match.group()).lower() for match in found if match}


def requirement_lines(name: str) -> list[str]:
    return (ROOT / "requirements" / name).read_text().splitlines()


def test_every_requirement_is_pinned():
    pinned = names(requirement_lines("constraints.txt"))
    for file in ("runtime.txt", "demo.txt", "test.txt", "bench.txt"):
        assert names(requirement_lines(file)) <= pinned, file


def test_pins_are_exact_and_torch_has_no_index():
    lines = [line for line in requirement_lines("constraints.txt") if line and not line.startswith("#")]
    assert "torch==2.13.0" in lines
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.]+(; python_version (<|>=) \"3\.11\")?", line), line


def test_pinned_runtime_covers_the_declared_dependencies():
    assert names(METADATA["project"]["dependencies"]) <= names(requirement_lines("runtime.txt"))
    build = names(METADATA["build-system"]["requires"])
    assert build <= names(requirement_lines("runtime.txt"))


def test_extras():
    expected = {"triton", "flash-attn", "gguf", "ray", "plot", "bench", "test"}
    assert set(METADATA["project"]["optional-dependencies"]) == expected


def test_every_compiled_source_is_in_the_build_and_no_other():
    listed = set(re.findall(r"csrc/\w+/\w+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    present = {str(path.relative_to(ROOT)) for suffix in ("cpp", "cu") for path in ROOT.glob(f"csrc/*/*.{suffix}")}
    assert listed == present


def copy_of_the_package(folder: Path) -> Path:
    """A checkout without anything built."""
    ignore = shutil.ignore_patterns("*.so", "lib", "__pycache__", "models")
    shutil.copytree(ROOT / "ztok_fast", folder / "ztok_fast", ignore=ignore)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def build_in_place(checkout: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


def test_without_a_compiler_the_package_works_and_says_why(tmp_path):
    checkout = copy_of_the_package(tmp_path)
    result = build_in_place(checkout, PATH=str(tmp_path / "empty"))
    assert result.returncode == 0, result.stderr
    assert "ztok_fast: cpu: not built: a working C++17 compiler was not found" in result.stdout
    record = json.loads((checkout / "ztok_fast/lib/build.json").read_text())
    assert [entry["built"] for entry in record["parts"].values()] == [False] * 3
    code = (
        "import json; from ztok_fast import native; from ztok_fast.codec.bitpack import pack_codes, unpack_codes\n"
        "assert unpack_codes(pack_codes([5, 0, 7], 3), 3, 3).tolist() == [5, 0, 7]\n"
        "print(json.dumps([native.__file__, *(native.status(name).reason for name in native.PARTS)]))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    file, *reasons = json.loads(run.stdout)
    assert Path(file).is_relative_to(checkout)
    assert reasons == ["not built: a working C++17 compiler was not found"] * 3


def test_required_cuda_that_cannot_be_built_is_an_error(tmp_path):
    checkout = copy_of_the_package(tmp_path)
    result = build_in_place(checkout, PATH=str(tmp_path / "empty"), ZTOK_CUDA="1")
    assert result.returncode != 0
    assert "ZTOK_CUDA=1, but the CUDA library was not built: a working C++17 compiler was not found" in result.stderr


@pytest.mark.slow
def test_broken_nvcc_does_not_keep_the_rest_from_building(tmp_path):
    checkout = copy_of_the_package(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    nvcc = tools / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    result = build_in_place(checkout, PATH=f"{tools}:/usr/local/bin:/usr/bin:/bin")
    assert result.returncode == 0, result.stderr
    parts = json.loads((checkout / "ztok_fast/lib/build.json").read_text())["parts"]
    assert parts["cpu"]["built"] and parts["host"]["built"] and not parts["cuda"]["built"]
    assert parts["cuda"]["reason"].startswith(f"the CUDA build with {nvcc} failed")


@pytest.mark.slow
def test_wheel_without_a_compiler_installs(tmp_path):
    checkout = copy_of_the_package(tmp_path / "checkout")
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", str(target)]
    without_compilers = {"PATH": str(tmp_path / "empty")}
    result = subprocess.run([*command, "."], cwd=checkout, env=without_compilers, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    code = "from ztok_fast import native; print(native.__file__, native.status('cpu').reason)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=target, env={"PYTHONPATH": str(target)}, capture_output=True, text=True
    )
    assert run.stdout.split(maxsplit=1) == [
        str(target / "ztok_fast/native.py"),
        "not built: a working C++17 compiler was not found\n",
    ], run.stderr
