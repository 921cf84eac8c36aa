"""What the compiler makes of the engine's Triton kernels, on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
EXACT = {f"{name}.rn.f32" for name in ("fma", "mul", "add", "sub", "div", "sqrt")}
EXACT |= {f"{name}.rn.f64" for name in ("mul", "add", "sub")}  # no fma: sines and cosines have none


def test_every_operation_rounds_to_nearest_even_and_keeps_subnormal_numbers():
    """No approximate division or root, no flush to zero; in float64 nothing is fused."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.aot", "90", "engine"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    reports = {report["kernel"].split(":")[1]: report for report in map(json.loads, result.stdout.splitlines())}
    expected = {"norm", "angles", "rotate", "scores", "softmax", "values", "silu"}
    expected |= {"quantize_rows", "int8_linear", "ordered_linear"}
    assert set(reports) == {f"{name}_kernel" for name in expected}, result.stderr[-3000:]
    for name, report in reports.items():
        assert report["arithmetic"] and set(report["arithmetic"]) <= EXACT, (name, report["arithmetic"])
        assert report["spill_stores"] == report["stack"] == 0, report
    assert "fma.rn.f32" in reports["scores_kernel"]["arithmetic"]
    assert {"mul.rn.f64", "add.rn.f64"} <= set(reports["angles_kernel"]["arithmetic"])
