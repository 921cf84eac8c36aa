"""Which backend runs an op: what each needs, and how one is forced."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import ztok_fast
from tests.ops.marked_backend import (
    ASSIGN,
    CPU,
    CUDA,
    MARKED,
    MODULE,
    REFERENCE,
    ROOT,
    assign,
    marked,
    marked_backward,
    nothing_forced,
    prefer,
)
from ztok_fast import ops
from ztok_fast.ops import backends
from ztok_fast.ops.backends import LIBRARIES, NAMES, Backend, BackendUnavailable, forced_backend
from ztok_fast.ops.op import OPS

__all__ = ["marked", "marked_backward", "nothing_forced"]  # fixtures

# --- the registry


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_registered_and_has_a_reference(name):
    op = OPS[name]
    assert hasattr(torch.ops.ztok, name)
    names = [backend.name for backend in op.backends]
    assert names[-1] == "reference" and len(set(names)) == len(names) and set(names) <= set(NAMES)
    for backend in op.backends:
        assert backend.library in (None, *LIBRARIES)
        if backend.library is None or LIBRARIES[backend.library]() is None:
            key = {"cpu": "CPU", "cuda": "CUDA"}.get(backend.device_type)
            if backend.compiled:
                assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ztok::{name}", key)
            else:
                assert callable(backends.load(backend.implementation))


@pytest.mark.parametrize("name", [name for name in OPS if f"{name}_backward" in OPS])
def test_a_backward_pass_has_a_backend_wherever_its_op_has_one(name):
    """Or the reference's, forced by name: training must not stop where inference goes."""
    assert OPS[name].backward is not None
    assert OPS[f"{name}_backward"].has("reference")


# --- what a backend needs


def test_the_first_backend_that_can_is_chosen(marked):
    assert assign() == MARKED
    assert assign(width=9) == REFERENCE
    assert assign(dtype=torch.float64) == REFERENCE
    assert next(b for b in ASSIGN.backends if not list(b.unmet(CUDA))).name != "cuda"


def test_unmet_needs_are_said(marked):
    assert list(marked.unmet(CPU, [torch.float32], args=(torch.ones(1, 8),))) == []
    assert list(marked.unmet(CUDA, [torch.float64], args=(torch.ones(1, 9),))) == [
        "runs on cpu, not on cuda",
        "takes torch.float32, not torch.float64",
        "runs only where the width is at most 8",
    ]


def test_dtypes_of_all_floating_point_tensors_are_compared(monkeypatch):
    narrow = Backend("cuda", f"{MODULE}:marked_codebook_assign", dtypes=(torch.float16, torch.float32))
    prefer(monkeypatch, ASSIGN, narrow)
    x = torch.ones(2, 4)
    assert ops.codebook_assign(x, torch.ones(3, 4)).codes.tolist() == MARKED
    assert ops.codebook_assign(x, torch.ones(3, 4, dtype=torch.float64)).codes.tolist() == REFERENCE
    with ztok_fast.backend("cuda"), pytest.raises(BackendUnavailable, match="float32, not torch.float64"):
        ops.codebook_assign(x, torch.ones(3, 4, dtype=torch.float64))


def test_more_rows_go_to_another_backend(monkeypatch):
    few = Backend(
        "cuda", f"{MODULE}:marked_codebook_assign", condition=("there is one row", lambda x, *_: x.shape[0] == 1)
    )
    prefer(monkeypatch, ASSIGN, few)
    assert assign(rows=1) == MARKED[:1]
    assert assign(rows=2) == REFERENCE
    with ztok_fast.backend("cuda"), pytest.raises(BackendUnavailable, match="runs only where there is one row"):
        assign(rows=2)


def test_a_transposed_weight_goes_to_the_backend_that_reads_it_in_place(monkeypatch):
    """Few rows on a GPU: the decode kernel would copy the weight at every call."""
    for library in LIBRARIES:
        monkeypatch.setitem(LIBRARIES, library, lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight = torch.zeros(3, 4), torch.zeros(8, 4)
    chosen = [
        next(b for b in OPS["lora_linear"].backends if not list(b.unmet(CUDA, [rows.dtype], args=(rows, w)))).name
        for rows, w in ((x, weight), (x, weight.T.contiguous().T), (torch.zeros(65, 4), weight))
    ]
    assert chosen == ["cuda", "triton", "triton"]


def test_missing_library_is_said(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(LIBRARIES, "triton", lambda: "the package triton is not installed")
    row = Backend("triton", "nowhere:nothing", library="triton")
    assert list(row.unmet(CPU)) == ["the package triton is not installed"]


def test_too_old_a_library_is_said(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    for version, reason in (
        ("3.6.0", None),
        ("4.0", None),
        ("3.5.1", "triton 3.6 or newer is needed, 3.5.1 is installed"),
    ):
        monkeypatch.setattr(backends.metadata, "version", lambda name, version=version: version)
        assert backends._triton_missing.__wrapped__() == reason


@pytest.mark.parametrize(
    ("triton", "numpy", "fails"), [("3.6.0", "2.4.1", True), ("3.6.0", "2.3.5", False), ("3.9.0", "2.4.1", False)]
)
def test_an_interpreter_that_runs_no_loops_is_said(monkeypatch, triton, numpy, fails):
    versions = {"triton": triton, "numpy": numpy}
    backends._interpreter_fails.cache_clear()
    monkeypatch.setattr(backends.metadata, "version", versions.__getitem__)
    monkeypatch.setitem(LIBRARIES, "triton", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    row = next(row for row in ASSIGN.backends if row.name == "triton")
    reasons = list(row.unmet(CPU, forced=True))
    backends._interpreter_fails.cache_clear()
    assert bool(reasons) == fails and all(f"numpy 2.4 and newer, {numpy}" in reason for reason in reasons)


def test_interpreted_kernels_run_only_when_forced(monkeypatch):
    monkeypatch.setitem(LIBRARIES, "triton", lambda: None)
    monkeypatch.setattr(backends, "_interpreter_fails", lambda: None)
    row = Backend("triton", f"{MODULE}:marked_codebook_assign", "cuda", library="triton")
    prefer(monkeypatch, ASSIGN, row, ASSIGN.backends[-1], only=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert assign() == REFERENCE
    assert "only if it is forced" in next(row.unmet(CPU))
    with ztok_fast.backend("triton", ["codebook_assign"]):
        assert assign() == MARKED
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(ASSIGN, "_chosen", {})
    assert not row.runs_on("cpu") and row.runs_on("cuda")
    with ztok_fast.backend("triton", ["codebook_assign"]):
        with pytest.raises(BackendUnavailable, match=r"runs on cuda, not on cpu, .*TRITON_INTERPRET=1"):
            assign()


def test_compute_capability_is_compared(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert list(Backend("cuda", "nowhere:nothing", min_capability=(8, 6)).unmet(CUDA)) == []
    newer = Backend("cuda", "nowhere:nothing", min_capability=(9, 0))
    assert list(newer.unmet(CUDA)) == ["needs compute capability 9.0, the device has 8.6"]
    assert list(newer.unmet(CPU)) == []


# --- forcing one


def test_backend_is_forced_and_let_go(marked):
    with ztok_fast.backend("reference"):
        assert assign() == REFERENCE
        with ztok_fast.backend("cuda", ops=["codebook_assign"]):
            assert assign() == MARKED
            assert forced_backend("residual_quantize") == "reference"
        assert assign() == REFERENCE
    assert assign() == MARKED
    assert forced_backend("codebook_assign") is None


def test_inner_block_for_all_ops_overrides_outer_block_for_one(marked):
    with ztok_fast.backend("cuda", ops=["codebook_assign"]), ztok_fast.backend("reference"):
        assert assign() == REFERENCE


def test_backend_is_let_go_after_an_error(marked):
    with pytest.raises(RuntimeError, match="inside"), ztok_fast.backend("reference"):
        raise RuntimeError("inside")
    assert assign() == MARKED


def test_other_threads_are_not_forced(marked):
    results = []
    with ztok_fast.backend("reference"):
        thread = threading.Thread(target=lambda: results.append(assign()))
        thread.start()
        thread.join()
    assert results == [MARKED]


def test_unknown_names():
    with pytest.raises(ValueError, match="backend: name must be one of .*reference.*, got 'warp'"), ops.backend("warp"):
        pass
    with pytest.raises(ValueError, match="backend: ops must name ops of .*, got 'x'"), ops.backend("reference", ["x"]):
        pass


def test_forced_backend_that_cannot_is_an_error(marked):
    with ztok_fast.backend("cuda"):
        with pytest.raises(BackendUnavailable, match=r"codebook_assign: the forced .*where the width is at most 8"):
            assign(width=9)
        with pytest.raises(BackendUnavailable, match="residual_quantize: .*cuda: the op has no such backend"):
            ops.residual_quantize(torch.ones(2, 3), torch.ones(1, 2, 3))


def test_no_backend_at_all(monkeypatch):
    narrow = ("the width is at most 2", lambda x, *_: x.shape[1] <= 2)
    prefer(
        monkeypatch, ASSIGN, Backend("cuda", "nowhere:x", dtypes=(torch.float16,), condition=narrow), only=True
    )  # fmt: skip
    why = r"\(cuda: takes torch.float16, not torch.float32; runs only where the width is at most 2\)"
    with pytest.raises(BackendUnavailable, match=f"codebook_assign: no backend can run it {why}"):
        assign()


IN_A_PROCESS = """
import torch, ztok_fast
from tests.ops import marked_backend as t
from ztok_fast.ops import backends
backends._forced.by_op = backends._Forced.by_op
t.ASSIGN.backends = (t.MARKED_ROW, *t.ASSIGN.backends)
"""


def process(script, first="", **environment):
    """Run a script in which `codebook_assign` has the marked backend; returns what it prints. `first` runs before."""
    return subprocess.run(
        [sys.executable, "-c", first + IN_A_PROCESS + script],
        check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip


def test_environment_variable_forces():
    """In every thread; a block decides against it."""
    script = """
import threading
seen = [t.assign()]
thread = threading.Thread(target=lambda: seen.append(t.assign()))
thread.start(), thread.join()
with ztok_fast.backend("cuda"):
    seen.append(t.assign())
print(*(codes == t.MARKED for codes in seen))
"""
    assert process(script, ZTOK_BACKEND="reference") == ["False", "False", "True"]
    assert process(script, ZTOK_BACKEND="") == ["True", "True", "True"]


def test_unknown_name_in_the_environment():
    script = """
try:
    t.assign()
except ValueError as error:
    print(error)
"""
    said = " ".join(process(script, ZTOK_BACKEND="warp"))
    assert said.startswith("ZTOK_BACKEND must be one of") and said.endswith("reference, got 'warp'")


def test_without_any_compiled_library():
    """The reference runs, and the compiled backends say why they do not."""
    first = """
from pathlib import Path
from ztok_fast import native
native.LIBRARY_DIR = Path("nowhere")
native._host_path = lambda: Path("nowhere")
"""
    script = """
for name, op in t.OPS.items():
    if op.spec is not None:
        inputs = op.spec.make(op.spec.samples[1], torch.float32, torch.Generator().manual_seed(0))
        op.spec.public(**inputs)
        if op.has("cpp"):
            try:
                with ztok_fast.backend("cpp", [name]):
                    op.spec.public(**inputs)
            except backends.BackendUnavailable as error:
                assert "the compiled CPU library is not available (" in str(error), error
            else:
                raise AssertionError(name)
print(*(native.status(part).available for part in native.PARTS))
"""
    assert process(script, first) == ["False"] * 3
