"""Builds the C++ and CUDA parts with CMake; without a compiler the package installs and works as pure Python.

Everything else about the package is in pyproject.toml. What was built, and why a part was not, is written to
``ztok_fast/lib/build.json``, which ``ztok_fast.native`` and the doctor report.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_REQUIRED = "ZTOK_CUDA"  # "1": a CUDA library that does not build is an error; "0": do not build it


def find_program(name: str) -> str | None:
    """The program of this environment, which need not be on the PATH, or else the one on the PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def find_cxx() -> str | None:
    """A C++ compiler that compiles and links a C++17 program, or None."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        compiler = shutil.which(name)
        if compiler is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <optional>\nint main() { return std::optional<int>{0}.value(); }\n")
            command = [compiler, "-std=c++17", str(source), "-o", str(Path(folder, "probe"))]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return compiler
    return None


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def package_folder(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    return spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None


class CMakeBuild(build_ext):
    """Installs ``_host`` and ``lib/`` into the package: in the checkout for an editable install, else in the wheel."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        self.package = ROOT / "ztok_fast" if in_place else Path(self.build_lib).resolve() / "ztok_fast"
        (self.package / "lib").mkdir(parents=True, exist_ok=True)
        report = self.build_all()
        for name, entry in report["parts"].items():
            print(f"ztok_fast: {name}: {'built' if entry['built'] else 'not built: ' + entry['reason']}", flush=True)
            if not entry["built"]:
                self.remove_stale(name)
        (self.package / "lib" / "build.json").write_text(json.dumps(report, indent=2) + "\n")

    def build_all(self) -> dict:
        torch_dir, pybind11_dir = package_folder("torch"), package_folder("pybind11")
        cxx, cmake, nvcc = find_cxx(), find_program("cmake"), find_nvcc()
        reasons = {"cpu": "", "host": "", "cuda": ""}
        if torch_dir is None:
            reasons["cpu"] = reasons["cuda"] = (
                "torch is not importable while building; install torch first, then use pip install --no-build-isolation"
            )
        if pybind11_dir is None:
            reasons["host"] = "pybind11 is not installed"
        elif not Path(sysconfig.get_path("include"), "Python.h").is_file():
            reasons["host"] = "Python's headers (Python.h) are not installed"
        if os.environ.get(CUDA_REQUIRED) == "0":
            reasons["cuda"] = f"{CUDA_REQUIRED}=0"
        elif nvcc is None:
            reasons["cuda"] = "nvcc was not found"
        for program, found in (("a working C++17 compiler", cxx), ("cmake", cmake)):
            if found is None:
                reasons = dict.fromkeys(reasons, f"{program} was not found")

        define = {"CMAKE_CXX_COMPILER": cxx, "Python_EXECUTABLE": sys.executable, "ZTOK_TORCH_DIR": torch_dir}
        if pybind11_dir:
            define["pybind11_DIR"] = str(Path(pybind11_dir, "share/cmake/pybind11"))
        wanted = {name: not reasons[name] for name in ("cpu", "host")}
        if any(wanted.values()):
            switches = {f"ZTOK_BUILD_{name.upper()}": "ON" if on else "OFF" for name, on in wanted.items()}
            self.cmake(cmake, "native", define | switches)
        if not reasons["cuda"]:
            switches = {"ZTOK_BUILD_CPU": "OFF", "ZTOK_BUILD_HOST": "OFF", "ZTOK_BUILD_CUDA": "ON"}
            try:
                self.cmake(cmake, "cuda", define | switches | {"CMAKE_CUDA_COMPILER": nvcc})
            except subprocess.CalledProcessError as error:
                # A half-installed toolkit must not keep anyone from the rest of the package.
                reasons["cuda"] = f"the CUDA build with {nvcc} failed (exit status {error.returncode})"
        if os.environ.get(CUDA_REQUIRED) == "1" and reasons["cuda"]:
            raise SystemExit(f"ztok_fast: {CUDA_REQUIRED}=1, but the CUDA library was not built: {reasons['cuda']}")
        return {
            "torch": self.torch_version(torch_dir),
            "cxx": cxx,
            "nvcc": nvcc,
            "parts": {name: {"built": not reason, "reason": reason} for name, reason in reasons.items()},
        }

    def cmake(self, cmake: str, name: str, define: dict[str, str | None]) -> None:
        folder = Path(self.build_temp).resolve() / name
        # A cache from another environment names programs and headers that may be gone.
        shutil.rmtree(folder, ignore_errors=True)
        options = [f"-D{key}={value}" for key, value in define.items() if value]
        if ninja := find_program("ninja"):
            options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(folder), *options], check=True)
        subprocess.run([cmake, "--build", str(folder)], check=True)
        subprocess.run([cmake, "--install", str(folder), "--prefix", str(self.package)], check=True)

    def remove_stale(self, name: str) -> None:
        """A library of an earlier build must not be taken for one of this build."""
        pattern = "_host*.so" if name == "host" else f"lib/libztok_{name}.*"
        for path in self.package.glob(pattern):
            path.unlink()

    @staticmethod
    def torch_version(torch_dir: str | None) -> str | None:
        if torch_dir is None:
            return None
        from importlib.metadata import version

        return version("torch")

    def get_outputs(self) -> list[str]:
        package = getattr(self, "package", None)
        if package is None:
            return []
        return [str(path) for pattern in ("_host*", "lib/*") for path in package.glob(pattern)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("ztok_fast._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
