"""No compiled CPU op reads or writes outside its tensors, on any instruction set (tests/native/guarded_ops.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ztok_fast import native

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("baseline", "avx2", "avx512")


def best() -> int:
    return torch.ops.ztok.isa_native(-1) if native.status("cpu").available else 0


@pytest.mark.skipif(not native.status("cpu").available, reason=f"CPU library: {native.status('cpu').reason}")
@pytest.mark.parametrize(
    "isa", [pytest.param(i, id=NAMES[i], marks=() if i == best() else pytest.mark.slow) for i in range(best() + 1)]
)
def test_every_op_stays_within_its_tensors(isa):
    command = [sys.executable, "-m", "tests.native.guarded_ops", str(isa)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    calls = result.stdout.splitlines()
    assert result.returncode == 0, f"{result.returncode} in {calls[-1:]}\n{result.stderr}"
    assert calls[-1] == "done"
