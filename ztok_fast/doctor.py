"""What runs here and why: `python -m ztok_fast.doctor`.

Prints versions, the CPU and its features, GPUs, the compiled libraries, and for each op and device the backend that is
chosen and why the others are not. Everything about ops comes from their declarations, `ztok_fast.ops.op.OPS`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata

import torch

import ztok_fast.ops  # noqa: F401 (declares the ops)
from ztok_fast import native
from ztok_fast.ops.backends import forced_backend
from ztok_fast.ops.op import OPS, Op

PACKAGES = ("ztok-fast", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "triton")
VARIABLES = ("ZTOK_BACKEND", "ZTOK_DEBUG_CHECKS")


def environment() -> dict:
    """Versions, CPU, GPUs and environment variables; JSON-serialisable."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "model": _cpu_model(),
            "features": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "cuda": {"torch_built_for": torch.version.cuda, "devices": [_gpu(i) for i in range(torch.cuda.device_count())]},
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # names the build, "+cu130" say, which the package's metadata need not
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform module knows as much as there is to know
    return platform.processor() or platform.machine()


def _gpu(index: int) -> dict:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def devices() -> list[torch.device]:
    """The devices that ops are reported for: the CPU and every visible CUDA device."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def op_report(op: Op, device: torch.device) -> dict:
    """The backend chosen for an op on a device, None if there is none, and why each other one is not.

    Dtypes are left out, and so are conditions on the shape, which are only said.
    """
    forced = os.environ.get("ZTOK_BACKEND") or None
    try:
        forced, error = forced_backend(op.name), None
    except ValueError as refusal:
        error = str(refusal)
    others = {b.name: list(b.unmet(device, forced=b.name == forced)) for b in op.backends}
    able = [b for b in op.backends if not others[b.name] and forced in (None, b.name)]
    if able and error is None:
        chosen = able[0].name
        del others[chosen]
        where = f" where {able[0].condition[0]}" if able[0].condition else ""
    else:
        chosen, where = None, ""
        error = error or f"{op.name}: {f'{forced} is forced' if forced else 'no backend can run it'}"
    why = f"ZTOK_BACKEND forces {forced}" if forced else f"{chosen} is preferred{where}"
    others = {name: reasons or [why] for name, reasons in others.items()}
    return {"op": op.name, "device": str(device), "backend": chosen, "error": error, "others": others}


def collect() -> dict:
    """The whole report; JSON-serialisable."""
    return {
        "environment": environment(),
        "native": native.build_info(),
        "ops": [op_report(op, device) for device in devices() for op in OPS.values()],
    }


def render(report: dict) -> str:
    """The report as text."""
    env, built = report["environment"], report["native"]
    lines = ["environment", f"  python        {env['python']} on {env['platform']}"]
    lines += [f"  {name:<13} {version or 'not installed'}" for name, version in env["packages"].items()]
    cpu = env["cpu"]
    lines.append(f"  CPU           {cpu['model']}, {cpu['features']}, {cpu['threads']} threads")
    gpus = env["cuda"]["devices"]
    for gpu in gpus:
        lines.append(f"  GPU           {gpu['name']}, {gpu['compute_capability']}, {gpu['memory_gib']} GiB")
    if not gpus:
        cuda = env["cuda"]["torch_built_for"]
        lines.append(f"  GPU           none ({f'torch for CUDA {cuda}' if cuda else 'torch without CUDA'})")
    lines += [f"  {name} = {value}" for name, value in env["variables"].items() if value is not None]

    lines += ["", "compiled libraries"]
    for name, part in built["parts"].items():
        lines.append(f"  {name:<13} {'loaded: ' + part['path'] if part['available'] else 'no: ' + part['reason']}")
    for tool in ("torch", "cxx", "nvcc"):
        lines.append(f"  built with    {tool} {built[tool] or '(none)'}")

    device = None
    for entry in report["ops"]:
        if entry["device"] != device:
            device = entry["device"]
            lines += ["", f"ops on {device}"]
        lines.append(f"  {entry['op']:<26} {entry['backend'] or 'NONE: ' + entry['error']}")
        lines += [f"  {'':<26}   not {name}: {'; '.join(why)}" for name, why in entry["others"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the report.

    Returns:
        0 when every op has a backend on every device, 1 otherwise.
    """
    parser = argparse.ArgumentParser(prog="python -m ztok_fast.doctor", description="Show what runs here and why.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    report = collect()
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    return 0 if all(entry["backend"] for entry in report["ops"]) else 1


if __name__ == "__main__":
    sys.exit(main())
