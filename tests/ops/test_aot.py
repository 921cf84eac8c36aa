"""Every Triton kernel compiles for every architecture as it is launched, stays in registers and shared memory, and uses
the tensor cores where it should. No GPU is needed; `tests/ops/aot.py` says how."""

import ast
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# compute capability -> name of the architecture whose code is made (the features of 90a and 100a included)
ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
# bytes of shared memory that one block may have; what is made for 8.0 runs on 8.6 and 8.9 too, which have less
SHARED_LIMITS = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the package triton is not installed")


def kernels():
    """Every kernel of the package as "module:function": `@triton.jit` functions whose names end in `_kernel`."""
    for path in sorted((ROOT / "ztok_fast").rglob("triton*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                    yield f"{module}:{node.name}"


@functools.cache
def compiled(capability, which):
    """Reports of a set of launches by kernel, and what went wrong: one process, since most of its time is imports."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.aot", str(capability), "--set", which],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    reports = {}
    for report in map(json.loads, result.stdout.splitlines()):
        reports.setdefault(report["kernel"], []).append(report)
    return reports, result.stderr


def check(capability, which, kernel):
    reports, errors = compiled(capability, which)
    assert kernel in reports and kernel not in errors, errors[-3000:]
    for report in reports[kernel]:
        assert report["target"] == ARCHITECTURES[capability]
        assert report["stack"] == report["spill_stores"] == report["spill_loads"] == 0, report
        assert report["shared"] <= SHARED_LIMITS[capability], report
        assert report["cubin_bytes"] > 0
        if capability == 90 and report["wants_wgmma"]:
            assert "wgmma" in report["instructions"], report


@pytest.mark.parametrize("kernel", list(kernels()))
def test_the_largest_launch_stays_within_its_resources(kernel):
    check(90, "kernels", kernel)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("kernel", list(kernels()))
def test_every_variant_stays_within_its_resources(kernel, capability):
    check(capability, "variants", kernel)


def test_products_of_16_bit_numbers_take_warp_group_instructions():
    """The check above would notice: there are launches that want them."""
    reports, _ = compiled(90, "kernels")
    wanting = {kernel.split(":")[1] for kernel, found in reports.items() if any(r["wants_wgmma"] for r in found)}
    assert {"scan_kernel", "residual_search_kernel"} <= wanting


def test_spills_and_stack_frames_are_seen():
    """The check above would notice: a kernel that must spill."""
    from tests.ops import aot

    result = subprocess.run(
        [sys.executable, "-m", aot.__name__, "80", "--spills"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    assert report["spill_stores"] > 0 and report["stack"] > 0
