"""Which backend runs an op: what each needs, how one is forced, and how little stands between a call and its kernel."""

import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import ztok_fast
from ztok_fast import native, ops
from ztok_fast.ops import backends, checks
from ztok_fast.ops.backends import LIBRARIES, NAMES, Backend, BackendUnavailable, forced_backend
from ztok_fast.ops.nearest import reference
from ztok_fast.ops.op import OPS

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ASSIGN = OPS["codebook_assign"]


def marked_codebook_assign(x, codebook, metric):
    """A second backend of `codebook_assign`, recognised by its codes: of equal ones not the lowest."""
    distances, codes = reference.codebook_assign(x, codebook, metric)
    return distances, codes + 2


def marked_codebook_assign_backward(x, codebook, codes, grad_distances, metric):
    """Its backward pass, recognised by its gradient."""
    return torch.full_like(x, 1000.0), torch.zeros_like(codebook)


MODULE = "tests.ops.test_backends"
# "cuda" is a name that `codebook_assign` has no backend of
MARKED_ROW = Backend(
    "cuda",
    f"{MODULE}:marked_codebook_assign",
    "cpu",
    dtypes=(torch.float32,),
    condition=("the width is at most 8", lambda x, *_: x.shape[1] <= 8),
)


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    """Whatever ZTOK_BACKEND says."""
    monkeypatch.setattr(backends._forced, "by_op", {})


def prefer(monkeypatch, op, *rows, only=False):
    """Put backends before those of an op, or in their place."""
    monkeypatch.setattr(op, "backends", rows if only else (*rows, *op.backends))
    monkeypatch.setattr(op, "_chosen", {})


@pytest.fixture
def marked(monkeypatch):
    """A preferred backend with every kind of limit."""
    prefer(monkeypatch, ASSIGN, MARKED_ROW)
    return MARKED_ROW


@pytest.fixture
def marked_backward(marked, monkeypatch):
    """The same backend with a backward pass."""
    row = Backend("cuda", f"{MODULE}:marked_codebook_assign_backward", condition=MARKED_ROW.condition)
    prefer(monkeypatch, OPS["codebook_assign_backward"], row)


def assign(width=4, dtype=torch.float32, rows=2):
    codes, _ = ops.codebook_assign(torch.ones(rows, width, dtype=dtype), torch.ones(3, width, dtype=dtype))
    return codes.tolist()


def distances(width=4, device="cpu"):
    """A leaf and distances that depend on it."""
    x = torch.ones(2, width, device=device, requires_grad=True)
    return x, ops.codebook_assign(x, torch.zeros(3, width, device=device), "dot").distances.sum()


def gradient(width=4):
    x, total = distances(width)
    return torch.autograd.grad(total, x)[0].unique().tolist()


REFERENCE, MARKED = [0, 0], [2, 2]
REFERENCE_GRADIENT, MARKED_GRADIENT = [0.0], [1000.0]


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
from tests.ops import test_backends as t
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


# --- backward passes


def test_backward_pass_is_dispatched(marked_backward):
    assert gradient() == MARKED_GRADIENT
    assert gradient(width=9) == REFERENCE_GRADIENT


def test_backward_pass_is_forced_with_its_op(marked_backward):
    for names in (None, ["codebook_assign"]):
        with ztok_fast.backend("reference", names):
            assert gradient() == REFERENCE_GRADIENT
            with ztok_fast.backend("cuda", ["codebook_assign"]):
                assert gradient() == MARKED_GRADIENT
    with ztok_fast.backend("reference", ["codebook_assign_backward"]):
        assert assign() == MARKED and gradient() == REFERENCE_GRADIENT


def test_the_block_around_the_forward_pass_decides(marked_backward):
    with ztok_fast.backend("cuda"):
        x, total = distances()
    with ztok_fast.backend("reference"):
        assert torch.autograd.grad(total, x)[0].unique().tolist() == MARKED_GRADIENT
        x, total = distances()
    assert torch.autograd.grad(total, x)[0].unique().tolist() == REFERENCE_GRADIENT


def test_backward_pass_is_forced_in_other_threads(marked_backward):
    """As in autograd's own for GPUs: what was forced goes with the call, not with the thread."""
    with ztok_fast.backend("reference"):
        x, total = distances()
    thread = threading.Thread(target=total.backward)
    thread.start()
    thread.join()
    assert x.grad.unique().tolist() == REFERENCE_GRADIENT


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_backward_pass_is_forced_in_the_threads_of_autograd(marked_backward):
    with ztok_fast.backend("reference"):
        x, total = distances(device="cuda")
        assert torch.autograd.grad(total, x)[0].unique().tolist() == REFERENCE_GRADIENT


def test_a_forced_backend_without_backward_pass_is_an_error(marked):
    with ztok_fast.backend("cuda", ["codebook_assign"]):
        with pytest.raises(BackendUnavailable, match="codebook_assign_backward: .*the op has no such backend"):
            gradient()
        with ztok_fast.backend("reference", ["codebook_assign_backward"]):
            assert gradient() == REFERENCE_GRADIENT


# --- compiled code, modes, subclasses


def compiled(backend):
    return torch.compile(
        lambda x, c: ops.codebook_assign(x, c, "dot"), fullgraph=True, backend=backend, dynamic=False
    )  # fmt: skip


def test_compiled_code_obeys_when_it_runs(marked):
    torch._dynamo.reset()
    x, codebook = torch.ones(2, 4), torch.ones(3, 4)
    function = compiled("eager")
    assert function(x, codebook).codes.tolist() == MARKED
    with ztok_fast.backend("reference"):
        assert function(x, codebook).codes.tolist() == REFERENCE
    assert function(x, codebook).codes.tolist() == MARKED


def test_compiled_backward_pass_obeys_when_it_runs(marked_backward):
    torch._dynamo.reset()
    x, codebook = torch.ones(2, 4, requires_grad=True), torch.zeros(3, 4)
    function = compiled("aot_eager")

    def found():
        return torch.autograd.grad(function(x, codebook).distances.sum(), x)[0].unique().tolist()

    assert found() == MARKED_GRADIENT
    with ztok_fast.backend("reference"):
        assert found() == REFERENCE_GRADIENT


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A subclass that notes which ops it meets."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def test_modes_and_subclasses_meet_the_registered_op(marked):
    x, codebook = torch.randn(3, 4), torch.randn(5, 4)
    expected = ops.codebook_assign(x, codebook).codes
    with Recorder() as recorder:
        assert torch.equal(ops.codebook_assign(x, codebook).codes, expected)
    assert ASSIGN.by_name in recorder.ops
    with FakeTensorMode():
        assert isinstance(ops.codebook_assign(torch.empty(3, 4), torch.empty(5, 4)).codes, FakeTensor)
    traced = make_fx(lambda x: ops.codebook_assign(x, codebook).codes)(x)
    assert ASSIGN.by_name in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(x), expected)
    assert torch.equal(ops.codebook_assign(x.as_subclass(Wrapped), codebook).codes, expected)
    assert ASSIGN.by_name in Wrapped.seen


def test_gradients_are_recorded_where_they_are_asked_for():
    x = torch.randn(3, 4, requires_grad=True)
    assert ops.codebook_assign(x, torch.randn(5, 4)).distances.grad_fn is not None
    with torch.no_grad():
        assert ops.codebook_assign(x, torch.randn(5, 4)).distances.grad_fn is None


def test_vmap_gives_the_reference():
    arguments = (
        torch.randn(3, 4),
        torch.randn(5, 4),
        None,
        torch.randn(1, 2, 4),
        torch.randn(1, 5, 2),
        torch.ones(1),
        None,
    )
    expected = ops.lora_linear(*arguments)
    rows = torch.stack([arguments[0], -arguments[0]])
    found = torch.func.vmap(lambda x: ops.lora_linear(x, *arguments[1:]))(rows)[0]
    torch.testing.assert_close(found, expected)


def test_strided_input_gives_what_the_fake_kernels_say():
    x, codebooks = torch.randn(4, 6).T, torch.randn(4, 5, 2).permute(2, 1, 0)
    result = torch.ops.ztok.residual_quantize(x, codebooks, None)
    assert all(t.is_contiguous() for t in result)
    torch.library.opcheck(torch.ops.ztok.residual_quantize.default, (x, codebooks.requires_grad_(), None))
    gradients = torch.ops.ztok.residual_quantize_backward(x, codebooks.detach(), result[3], x, *result[1:3])
    assert all(t.is_contiguous() for t in gradients)


# --- the way to a kernel

MOST_FRAMES = 3
CPP = [name for name, op in OPS.items() if op.spec is not None and op.has("cpp")]


@pytest.mark.skipif(not native.status("cpu").available, reason="no compiled CPU library")
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("name", CPP)
def test_few_python_frames_lie_between_a_public_op_and_its_kernel(name, forced):
    op, public = OPS[name], getattr(ops, name)
    inputs = op.spec.make(op.spec.samples[0], torch.float32, torch.Generator().manual_seed(0))
    depths = []

    def profile(frame, event, called):
        if event == "c_call" and called is op._compiled:
            depth = 1
            while frame.f_code is not public.__code__:
                frame, depth = frame.f_back, depth + 1
            depths.append(depth)

    with ztok_fast.backend("cpp", [name]) if forced else nullcontext():
        sys.setprofile(profile)
        try:
            op.spec.public(**inputs)
        finally:
            sys.setprofile(None)
    assert depths == [depths[0]] and depths[0] <= MOST_FRAMES


# --- the package


def test_debug_switch_decides_off_the_cpu(monkeypatch):
    elsewhere = torch.empty(1, device="meta")
    for value, expected in ((None, False), ("0", False), ("", False), ("1", True)):
        if value is None:
            monkeypatch.delenv("ZTOK_DEBUG_CHECKS", raising=False)
        else:
            monkeypatch.setenv("ZTOK_DEBUG_CHECKS", value)
        assert checks.value_checks(elsewhere) is expected
        assert checks.value_checks(torch.empty(1))


def test_importing_the_package_is_light():
    """`import ztok_fast` loads no torch, the ops load no transformers."""
    script = (
        "import sys, ztok_fast; assert 'torch' not in sys.modules; "
        "import ztok_fast.ops; assert 'transformers' not in sys.modules; assert 'triton' not in sys.modules; "
        "assert ztok_fast.backend is ztok_fast.ops.backend"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_unknown_attribute_of_the_package():
    with pytest.raises(AttributeError, match="module 'ztok_fast' has no attribute 'nothing'"):
        ztok_fast.nothing  # noqa: B018
