"""Metadata that other files rely on, and the install where there is no compiler, which says so and works."""

from __future__ import annotations

import ast
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
    for file in ("runtime.txt", "demo.txt", "test.txt", "bench.txt", "lint.txt", "docs.txt"):
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


IMPORT_NAMES = {"pyyaml": "yaml"}  # project -> module, where they differ


OPTIONAL = {"matplotlib", "zstandard", "brotli", "pyppmd"}
"""What `ztok bench` takes where it is installed; all are in the extra `bench`."""


def imports_of_the_package() -> set[str]:
    """Top-level modules of other projects that the package imports, anywhere."""
    found = set()
    for path in (ROOT / "ztok_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"ztok_fast"}


def test_dependencies_are_what_the_package_imports():
    extras = METADATA["project"]["optional-dependencies"]
    assert set(extras) == {"triton", "gguf", "corpus", "eval", "bench", "test", "lint", "docs"}
    declared = names(METADATA["project"]["dependencies"])
    for name in ("triton", "gguf", "corpus", "eval"):
        declared |= names(extras[name])
    assert names(extras["bench"]) >= OPTIONAL
    declared -= OPTIONAL
    imported = imports_of_the_package() - OPTIONAL - {"llama_cpp"}  # llama.cpp is timed where a user has it
    assert {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared} == imported


def test_one_version():
    import ztok_fast

    assert METADATA["project"]["dynamic"] == ["version"]
    assert METADATA["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ztok_fast.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", ztok_fast.__version__)
    assert set(ztok_fast.__all__) == {*ztok_fast._EXPORTS, "__version__"}
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_carries_what_runs():
    """The data files that setuptools puts into a wheel, without building one."""
    code = (
        "from setuptools import Distribution\n"
        "d = Distribution({'script_name': 'setup.py'}); d.parse_config_files()\n"
        "build = d.get_command_obj('build_py'); build.ensure_finalized(); build.editable_mode = False\n"
        "print('\\n'.join(f'{source}/{name}' for _, source, _, names in build.data_files for name in names))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # Compiled parts are named by build_ext, and are here only where the checkout has been built in place.
    files = {name for name in run.stdout.splitlines() if not name.endswith(".so") and "/lib/" not in name}
    expected = {"ztok_fast/py.typed", "ztok_fast/data/demo.txt", "ztok_fast/data/view.html"}
    for path in (ROOT / "ztok_fast/models").rglob("*"):
        if path.is_file() and not path.name.endswith("metrics.jsonl"):
            expected.add(str(path.relative_to(ROOT)))
    assert {name.removeprefix(f"{ROOT}/") for name in files if "egg-info" not in name} == expected


def test_hooks_and_lint_run_the_same_tools():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    used = set(re.findall(r"\.venv/bin/(\S+)", hooks))
    assert used == set(re.findall(r"\$\(VENV\)/bin/(\S+)", lint)) == {"ruff", "clang-format", "mypy"}
    assert "http" not in hooks
    assert used | {"pre-commit"} == set(METADATA["project"]["optional-dependencies"]["lint"])


def test_every_compiled_source_is_in_the_build():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    built = {path for pattern in re.findall(r"csrc/\w+/[*\w]+\.(?:cpp|cu)\b", cmake) for path in ROOT.glob(pattern)}
    assert built == {path for suffix in ("cpp", "cu") for path in ROOT.glob(f"csrc/*/*.{suffix}")}


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
