"""Every Triton kernel compiles for every architecture, stays in registers, and uses the tensor cores where it should.

No GPU is needed; the kernels and their configurations are those of `tests.ops.aot_cases`.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.aot_cases import ARCHITECTURES, CASES, SHARED_LIMITS, Case

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="the package triton is not installed")


def compile_cases(capability, *names):
    """Compile cases in a process of their own and return their reports by name, errors among them."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.aot_compile", str(capability), *names],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    reports = {report["name"]: report for report in map(json.loads, result.stdout.splitlines())}
    return reports, result.stderr


@functools.cache
def reports_of(capability, slow):
    """All quick, or all slow, cases of one architecture, compiled together: most of a short compilation is imports."""
    return compile_cases(capability, *(c.name for c in CASES if c.slow == slow and capability in c.capabilities))


def _parameters():
    for case in CASES:
        for capability in case.capabilities:
            marks = (pytest.mark.slow,) if case.slow else ()
            yield pytest.param(case, capability, id=f"{case.name}-{ARCHITECTURES[capability]}", marks=marks)


@pytest.mark.parametrize(("case", "capability"), list(_parameters()))
def test_compiles_within_its_resources(case: Case, capability: int):
    reports, errors = reports_of(capability, case.slow)
    assert case.name in reports, errors[-3000:]
    report = reports[case.name]
    assert report["target"] == ARCHITECTURES[capability]
    assert (report["stack"], report["spill_stores"], report["spill_loads"]) == (0, 0, 0), report
    assert report["shared"] <= SHARED_LIMITS[capability], report
    assert report["cubin_bytes"] > 0
    if capability == 90:
        assert set(case.sm90_needs) <= set(report["instructions"]), report


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_kernel_is_in_the_table():
    """A `@triton.jit` function that takes pointers and is launched somewhere has a case."""
    launched = set()
    for path in (ROOT / "ztok_fast").rglob("*.py"):
        launched |= set(re.findall(r"^\s*(?:[\w, ]+ = )?(\w+_kernel)\[", path.read_text(), re.MULTILINE))
    assert launched <= {case.kernel.split(":")[1] for case in CASES}


def test_spills_and_stack_frames_are_seen():
    """The check above would notice: a kernel that must spill."""
    reports, errors = compile_cases(80, "spills")
    assert "spills" in reports, errors[-3000:]
    assert reports["spills"]["spill_stores"] > 0 and reports["spills"]["stack"] > 0
