"""The compiled parts of the package: where they are, whether they load, and why not.

Three parts, each optional; without them every op and every codec feature works on the reference path:

- ``cpu``: ``lib/libztok_cpu.so``, tensor ops for the CPU, and the schemas of all native ops;
- ``cuda``: ``lib/libztok_cuda.so``, the same ops for CUDA and those that only CUDA has; it loads on a CPU-only torch
  too, so whether there is a device is for the caller to ask;
- ``host``: the pybind11 module ``ztok_fast._host``, which needs no torch.

The tensor libraries use PyTorch's stable ABI and hold no Python ABI: one build serves every torch >= 2.11 and every
Python. Importing this module loads nothing; a part is loaded when its status is first asked for, once. In a checkout a
part that was built from other sources than those beside the package is not loaded, and a warning says so.
`python -m ztok_fast.native` prints the status of each.
"""

from __future__ import annotations

import functools
import importlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ztok_fast import sources

PARTS = ("cpu", "cuda", "host")
LIBRARY_DIR = Path(__file__).resolve().parent / "lib"
_BUILD_AGAIN = "run `make build`, or `pip install --no-build-isolation --no-deps -e .` where torch is"


@dataclass(frozen=True)
class PartStatus:
    """Whether a compiled part can be used.

    ``available``: it is loaded. ``reason``: why it is not, empty when available. ``path``: the file it was, or would
    be, loaded from.
    """

    name: str
    available: bool
    reason: str
    path: Path


def status(name: str) -> PartStatus:
    """Load the part ``name`` ("cpu", "cuda" or "host") if that has not been tried yet, and say how it went.

    Never raises for a part that is missing, does not load or was built from other sources; the last is warned of
    (``RuntimeWarning``, once), since it looks as if it could be used. ``ValueError`` for another name.
    """
    if name not in PARTS:
        raise ValueError(f"name: expected one of {', '.join(PARTS)}, got {name!r}")
    return _load(name)


def host() -> ModuleType | None:
    """The host module ``ztok_fast._host``, or None where it is not available."""
    return importlib.import_module("ztok_fast._host") if status("host").available else None


def build_info() -> dict[str, Any]:
    """What was built, with which tools, and what of it loads here; JSON-serialisable.

    Keys: ``torch``, ``cxx``, ``nvcc`` (version or path at build time, None where absent or where nothing was built),
    ``host_compiler`` (None without the host module), ``parts`` (name -> ``available``, ``reason``, ``path``).
    """
    record = _build_record()
    module = host()
    parts = {name: status(name) for name in PARTS}
    return {
        **{key: record.get(key) for key in ("torch", "cxx", "nvcc")},
        "host_compiler": module.build_info() if module else None,
        "parts": {
            name: {"available": part.available, "reason": part.reason, "path": str(part.path)}
            for name, part in parts.items()
        },
    }


@functools.cache
def _load(name: str) -> PartStatus:
    path = LIBRARY_DIR / f"libztok_{name}.so"
    if name == "host":
        path = _host_path()
    if not path.is_file():
        return PartStatus(name, False, _why_not_built(name), path)
    try:
        if not _built_from_these_sources(name, path):
            reason = f"{path.name} was built from other sources; {_BUILD_AGAIN}"
            warnings.warn(f"ztok_fast: {reason}. Until then it is not used.", RuntimeWarning, stacklevel=3)
            return PartStatus(name, False, reason, path)
        if name == "host":
            importlib.import_module("ztok_fast._host")
        else:
            _load_ops(name, path)
    except (OSError, ImportError, RuntimeError) as error:
        return PartStatus(name, False, f"{path.name} does not load: {error}", path)
    return PartStatus(name, True, "", path)


def _built_from_these_sources(name: str, path: Path) -> bool:
    expected = sources.digest(name)
    return expected is None or expected == sources.recorded(name, path)


def _load_ops(name: str, path: Path) -> None:
    import torch

    if name == "cuda":
        cpu = status("cpu")
        if not cpu.available:
            raise RuntimeError(f"it needs the schemas of the CPU library, which is not available: {cpu.reason}")
    torch.ops.load_library(str(path))


def _host_path() -> Path:
    from importlib.machinery import EXTENSION_SUFFIXES

    package = Path(__file__).resolve().parent
    candidates = [package / f"_host{suffix}" for suffix in EXTENSION_SUFFIXES]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _build_record() -> dict[str, Any]:
    try:
        record = json.loads((LIBRARY_DIR / "build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _why_not_built(name: str) -> str:
    record = _build_record()
    if not record:
        return "not built: the package was installed without its build step (run `make build`)"
    reason = record.get("parts", {}).get(name, {}).get("reason")
    return f"not built: {reason}" if reason else "built, but the file is gone (run `make build`)"


if __name__ == "__main__":
    for part in map(status, PARTS):
        print(f"{part.name}: {'available' if part.available else part.reason}")
