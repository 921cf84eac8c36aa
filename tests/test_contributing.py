"""The op that CONTRIBUTING.md adds as an example is one that works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```\n", TEXT, re.DOTALL))

CHECK = """
import torch
import ztok_fast
from ztok_fast.ops import rms_rows
from ztok_fast.ops.op import OPS
from ztok_fast.ops.spec import close

spec = OPS["rms_rows"].spec
for sizes in spec.samples:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = spec.make(sizes, dtype, torch.Generator().manual_seed(0))
        for name in ("triton", "reference"):
            with ztok_fast.backend(name, ops=["rms_rows"]):
                result = rms_rows(**inputs)
            with ztok_fast.backend("reference"):
                close(result, rms_rows(inputs["x"].double()), dtype, spec.tolerance)
with ztok_fast.backend("reference"):
    assert torch.autograd.gradcheck(rms_rows, (torch.randn(3, 5, dtype=torch.float64, requires_grad=True),))
compiled = torch.compile(rms_rows, fullgraph=True, backend="aot_eager")
x = torch.randn(4, 7, requires_grad=True)
with ztok_fast.backend("reference"):
    torch.testing.assert_close(compiled(x), rms_rows(x))
    compiled(x).sum().backward()
assert x.grad is not None
try:
    rms_rows(x, eps=0)
except ValueError as error:
    assert "eps" in str(error)
else:
    raise AssertionError("eps=0 was accepted")
"""


def test_an_op_takes_six_files_at_most():
    new = {path for path in FILES if not (ROOT / path).exists()}
    assert len(FILES) == len(new) == 5  # the sixth is the export


def test_the_python_files_work(tmp_path):
    shutil.copytree(ROOT / "ztok_fast", tmp_path / "ztok_fast", ignore=shutil.ignore_patterns("models", "__pycache__"))
    for path, source in FILES.items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source, encoding="utf-8")
    exports = tmp_path / "ztok_fast/ops/__init__.py"
    exports.write_text(exports.read_text() + "from ztok_fast.ops.norm.rms_rows import rms_rows\n")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr


def test_the_kernel_compiles(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler was found")
    source = tmp_path / "rms_rows.cpp"
    source.write_text(FILES["csrc/cpu/rms_rows.cpp"], encoding="utf-8")
    includes = [Path(torch.__file__).parent / "include", ROOT / "csrc/common", ROOT / "csrc/cpu"]
    command = [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    run = subprocess.run(
        [*command, *(f"-isystem{includes[0]}", f"-I{includes[1]}", f"-I{includes[2]}"), str(source)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_what_it_points_to_exists():
    for path in re.findall(r"`((?:csrc|docs|tests|ztok_fast|configs)/[\w/.-]+\w)`", TEXT):
        assert path in FILES or (ROOT / path).exists() or "norm/" in path or "rms_rows" in path, path
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert target.startswith("https://") or (ROOT / target).exists(), target
