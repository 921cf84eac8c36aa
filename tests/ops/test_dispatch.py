import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import ztok_fast
from ztok_fast import ops
from ztok_fast.ops import checks, dispatch, requirements
from ztok_fast.ops.nearest import reference
from ztok_fast.ops.requirements import Requirement

CPU = torch.device("cpu")


def marked_codebook_assign(x, codebook, metric):
    """A second backend of `codebook_assign`, told by its codes: of equal ones not the lowest."""
    distances, codes = reference.codebook_assign(x, codebook, metric)
    return distances, codes + 2


def marked_codebook_assign_backward(x, codebook, codes, grad_distances, metric):
    """Its backward pass, told by its gradient."""
    return torch.full_like(x, 1000.0), torch.zeros_like(codebook)


@pytest.fixture
def marked(monkeypatch):
    """A preferred backend with every kind of limit."""
    row = Requirement(
        op="codebook_assign",
        backend="marked",
        implementation="tests.ops.test_dispatch:marked_codebook_assign",
        device_types=("cpu",),
        dtypes=(torch.float32,),
        max_width=8,
    )
    monkeypatch.setattr(requirements, "REQUIREMENTS", (row, *requirements.REQUIREMENTS))
    return row


def assign(width=4, dtype=torch.float32):
    codes, _ = ops.codebook_assign(torch.ones(2, width, dtype=dtype), torch.ones(3, width, dtype=dtype))
    return codes.tolist()


REFERENCE, MARKED = [0, 0], [2, 2]


@pytest.fixture
def marked_backward(marked, monkeypatch):
    """The same backend with a backward pass."""
    row = Requirement(
        op="codebook_assign_backward",
        backend="marked",
        implementation="tests.ops.test_dispatch:marked_codebook_assign_backward",
        max_width=8,
    )
    monkeypatch.setattr(requirements, "REQUIREMENTS", (row, *requirements.REQUIREMENTS))


def distances(width=4, device="cpu"):
    """A leaf and distances that depend on it."""
    x = torch.ones(2, width, device=device, requires_grad=True)
    return x, ops.codebook_assign(x, torch.zeros(3, width, device=device), "dot").distances.sum()


def gradient(width=4):
    x, total = distances(width)
    return torch.autograd.grad(total, x)[0].unique().tolist()


REFERENCE_GRADIENT, MARKED_GRADIENT = [0.0], [1000.0]


@pytest.mark.parametrize("op", requirements.ops())
def test_every_op_is_registered_and_has_a_reference(op):
    assert hasattr(torch.ops.ztok, op)
    assert requirements.rows_of(op)[-1].backend == "reference"
    for row in requirements.rows_of(op):
        if row.library is None or requirements.LIBRARIES[row.library]() is None:
            assert callable(dispatch.load(row.implementation))


def test_rows_are_told_apart():
    keys = [(row.op, row.backend) for row in requirements.REQUIREMENTS]
    assert len(keys) == len(set(keys))
    assert {row.library for row in requirements.REQUIREMENTS} <= {None, *requirements.LIBRARIES}


def test_unknown_op():
    with pytest.raises(KeyError, match="no op named 'frobnicate'"):
        requirements.rows_of("frobnicate")


def test_the_first_backend_that_can_is_chosen(marked):
    assert assign() == MARKED
    assert assign(width=9) == REFERENCE
    assert assign(dtype=torch.float64) == REFERENCE
    assert dispatch.choose("codebook_assign", torch.device("cuda")).backend != "marked"


def test_unmet_needs_are_said(marked):
    assert requirements.unmet(marked, CPU, torch.float32, 8) == []
    assert requirements.unmet(marked, torch.device("cuda"), torch.float64, 9) == [
        "runs on cpu, not on cuda",
        "takes torch.float32, not torch.float64",
        "takes a width of at most 8, not 9",
    ]


def test_other_arguments_dtypes_are_compared(monkeypatch):
    narrow = Requirement(
        op="codebook_assign",
        backend="narrow",
        implementation="tests.ops.test_dispatch:marked_codebook_assign",
        argument_dtypes=(torch.float16, torch.float32),
    )
    monkeypatch.setattr(requirements, "REQUIREMENTS", (narrow, *requirements.REQUIREMENTS))
    assert requirements.unmet(narrow, CPU, torch.float64, argument_dtypes={torch.bfloat16, torch.float64}) == [
        "takes torch.float16, torch.float32 beside the main tensor, not torch.bfloat16, torch.float64"
    ]
    x = torch.ones(2, 4)
    assert ops.codebook_assign(x, torch.ones(3, 4)).codes.tolist() == MARKED
    assert ops.codebook_assign(x, torch.ones(3, 4, dtype=torch.float64)).codes.tolist() == REFERENCE


def test_strided_input_gives_what_the_fake_kernels_say():
    x, codebooks = torch.randn(4, 6).T, torch.randn(4, 5, 2).permute(2, 1, 0)
    result = torch.ops.ztok.residual_quantize(x, codebooks, None)
    assert all(t.is_contiguous() for t in result)
    torch.library.opcheck(torch.ops.ztok.residual_quantize.default, (x, codebooks.requires_grad_(), None))
    gradients = torch.ops.ztok.residual_quantize_backward(x, codebooks.detach(), result[3], x, *result[1:3])
    assert all(t.is_contiguous() for t in gradients)


def test_missing_library_is_said(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(requirements.LIBRARIES, "triton", lambda: "the package triton is not installed")
    row = Requirement("codebook_assign", "triton", "nowhere:nothing", library="triton")
    assert requirements.unmet(row, CPU) == ["the package triton is not installed"]


def test_too_old_a_library_is_said(monkeypatch):
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: name)
    for version, reason in (
        ("3.6.0", None),
        ("4.0", None),
        ("3.5.1", "triton 3.6 or newer is needed, 3.5.1 is installed"),
    ):
        monkeypatch.setattr(requirements.metadata, "version", lambda name, version=version: version)
        assert requirements._triton_missing.__wrapped__() == reason


@pytest.mark.parametrize(
    ("triton", "numpy", "fails"), [("3.6.0", "2.4.1", True), ("3.6.0", "2.3.5", False), ("3.9.0", "2.4.1", False)]
)
def test_an_interpreter_that_runs_no_loops_is_said(monkeypatch, triton, numpy, fails):
    versions = {"triton": triton, "numpy": numpy}
    requirements._interpreter_fails.cache_clear()
    monkeypatch.setattr(requirements.metadata, "version", versions.__getitem__)
    monkeypatch.setitem(requirements.LIBRARIES, "triton", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    row = requirements.rows_of("z_select")[1]
    assert row.backend == "triton"
    reasons = requirements.unmet(row, CPU, forced=True)
    requirements._interpreter_fails.cache_clear()
    assert bool(reasons) == fails and all(f"numpy 2.4 and newer, {numpy}" in reason for reason in reasons)


def test_interpreted_kernels_run_only_when_forced(monkeypatch):
    monkeypatch.setitem(requirements.LIBRARIES, "triton", lambda: None)
    monkeypatch.setattr(requirements, "_interpreter_fails", lambda: None)
    kernel = "tests.ops.test_dispatch:marked_codebook_assign"
    row = Requirement("codebook_assign", "tiles", kernel, ("cuda",), library="triton")
    monkeypatch.setattr(requirements, "REQUIREMENTS", (row, *requirements.REQUIREMENTS))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert assign() == REFERENCE
    assert "only if it is forced" in requirements.unmet(row, CPU)[0]
    with ztok_fast.backend("tiles", ["codebook_assign"]):
        assert assign() == MARKED
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not requirements.runs_on(row, "cpu") and requirements.runs_on(row, "cuda")
    with ztok_fast.backend("tiles", ["codebook_assign"]):
        with pytest.raises(ops.BackendUnavailable, match=r"runs on cuda, not on cpu, .*TRITON_INTERPRET=1"):
            assign()


def test_compute_capability_is_compared(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    needs = {"op": "codebook_assign", "backend": "cuda", "implementation": "nowhere:nothing"}
    device = torch.device("cuda")
    assert requirements.unmet(Requirement(**needs, min_compute_capability=(8, 6)), device) == []
    assert requirements.unmet(Requirement(**needs, min_compute_capability=(9, 0)), device) == [
        "needs compute capability 9.0, the device has 8.6"
    ]
    assert requirements.unmet(Requirement(**needs, min_compute_capability=(9, 0)), CPU) == []


def test_backend_is_forced_and_let_go(marked):
    with ztok_fast.backend("reference"):
        assert assign() == REFERENCE
        with ztok_fast.backend("marked", ops=["codebook_assign"]):
            assert assign() == MARKED
            assert dispatch.forced_backend("halting_units") == "reference"
        assert assign() == REFERENCE
    assert assign() == MARKED


def test_inner_block_for_all_ops_overrides_outer_block_for_one(marked):
    with ztok_fast.backend("marked", ops=["codebook_assign"]), ztok_fast.backend("reference"):
        assert assign() == REFERENCE


def test_backend_is_let_go_after_an_error(marked):
    with pytest.raises(RuntimeError, match="inside"), ztok_fast.backend("reference"):
        raise RuntimeError("inside")
    assert assign() == MARKED


def test_what_is_forced_is_kept_as_long_as_it_is_and_no_longer():
    """torch 2.11 does not count its reference: a few blocks, and Python's memory was corrupt."""
    forced = {None: "reference"}
    references = sys.getrefcount(forced)
    for _ in range(3):
        dispatch._stash(forced)
        assert sys.getrefcount(forced) == references + 1
    dispatch._stash({})
    assert sys.getrefcount(forced) == references
    for _ in range(10_000):
        with ztok_fast.backend("reference"), ztok_fast.backend("cpp", ops=["z_select"]):
            assert (dispatch.forced_backend("z_select"), dispatch.forced_backend("ragged_pack")) == ("cpp", "reference")


def test_other_threads_are_not_forced(marked):
    results = []
    with ztok_fast.backend("reference"):
        thread = threading.Thread(target=lambda: results.append(assign()))
        thread.start()
        thread.join()
    assert results == [MARKED]


def test_backward_pass_is_dispatched(marked_backward):
    assert gradient() == MARKED_GRADIENT
    assert gradient(width=9) == REFERENCE_GRADIENT


def test_backward_pass_is_forced_with_its_op(marked_backward):
    for names in (None, ["codebook_assign"]):
        with ztok_fast.backend("reference", names):
            assert gradient() == REFERENCE_GRADIENT
            with ztok_fast.backend("marked", ["codebook_assign"]):
                assert gradient() == MARKED_GRADIENT
    with ztok_fast.backend("reference", ["codebook_assign_backward"]):
        assert assign() == MARKED and gradient() == REFERENCE_GRADIENT


def test_the_block_around_backward_decides(marked_backward):
    with ztok_fast.backend("marked"):
        x, total = distances()
    with ztok_fast.backend("reference"):
        assert torch.autograd.grad(total, x)[0].unique().tolist() == REFERENCE_GRADIENT


def test_a_forced_backend_without_backward_pass_is_an_error(marked):
    with ztok_fast.backend("marked", ["codebook_assign"]):
        with pytest.raises(ops.BackendUnavailable, match="codebook_assign_backward: .*the op has no such backend"):
            gradient()
        with ztok_fast.backend("reference", ["codebook_assign_backward"]):
            assert gradient() == REFERENCE_GRADIENT


def test_compiled_backward_pass_obeys(marked_backward):
    x, codebook = torch.ones(2, 4, requires_grad=True), torch.zeros(3, 4)
    compiled = torch.compile(
        lambda x, c: ops.codebook_assign(x, c, "dot").distances.sum(), fullgraph=True, backend="aot_eager"
    )
    assert torch.autograd.grad(compiled(x, codebook), x)[0].unique().tolist() == MARKED_GRADIENT
    with ztok_fast.backend("reference"):
        assert torch.autograd.grad(compiled(x, codebook), x)[0].unique().tolist() == REFERENCE_GRADIENT


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_backward_pass_is_forced_in_the_threads_of_autograd(marked_backward):
    x, total = distances(device="cuda")
    with ztok_fast.backend("reference"):
        assert torch.autograd.grad(total, x)[0].unique().tolist() == REFERENCE_GRADIENT


def test_environment_variable_forces(marked, monkeypatch):
    monkeypatch.setenv("ZTOK_BACKEND", "reference")
    assert assign() == REFERENCE
    with ztok_fast.backend("marked"):
        assert assign() == MARKED
    monkeypatch.setenv("ZTOK_BACKEND", "")
    assert assign() == MARKED


def test_unknown_names():
    with pytest.raises(ValueError, match="backend: name must be one of .*reference.*, got 'warp'"), ops.backend("warp"):
        pass
    with pytest.raises(ValueError, match="backend: ops must name ops of .*, got 'x'"), ops.backend("reference", ["x"]):
        pass


def test_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv("ZTOK_BACKEND", "warp")
    with pytest.raises(ValueError, match="ZTOK_BACKEND must be one of .*reference.*, got 'warp'"):
        assign()


def test_forced_backend_that_cannot_is_an_error(marked):
    with ztok_fast.backend("marked"):
        with pytest.raises(ops.BackendUnavailable, match=r"codebook_assign: the forced .*width of at most 8, not 9"):
            assign(width=9)
        with pytest.raises(ops.BackendUnavailable, match="halting_units: .*marked: the op has no such backend"):
            ops.halting_units(torch.ones(2), torch.tensor([0, 2]))


def test_no_backend_at_all(monkeypatch):
    row = Requirement("codebook_assign", "picky", "nowhere:nothing", dtypes=(torch.float16,), max_width=2)
    monkeypatch.setattr(requirements, "REQUIREMENTS", (row,))
    why = r"\(picky: takes torch.float16, not torch.float32; takes a width of at most 2, not 4\)"
    with pytest.raises(ops.BackendUnavailable, match=f"codebook_assign: no backend can run it {why}"):
        assign()


def test_compiled_code_obeys(marked):
    x, codebook = torch.ones(2, 4), torch.ones(3, 4)
    compiled = torch.compile(lambda x, c: ops.codebook_assign(x, c).codes, fullgraph=True, backend="eager")
    assert compiled(x, codebook).tolist() == MARKED
    with ztok_fast.backend("reference"):
        assert compiled(x, codebook).tolist() == REFERENCE


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
        "import ztok_fast.ops; assert 'transformers' not in sys.modules; "
        "assert ztok_fast.backend is ztok_fast.ops.backend"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_unknown_attribute_of_the_package():
    with pytest.raises(AttributeError, match="module 'ztok_fast' has no attribute 'nothing'"):
        ztok_fast.nothing  # noqa: B018


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def lora_arguments(make=torch.randn):
    x, weight, A, B = make(3, 4), make(5, 4), make(1, 2, 4), make(1, 5, 2)
    return x, weight, None, A, B, torch.ones(1), None


def test_a_plain_call_leaves_out_the_registration_and_no_other_does():
    plain = lora_arguments()
    expected = ops.lora_linear(*plain)
    with Recorder() as recorder:
        assert torch.equal(ops.lora_linear(*plain), expected)
    assert torch.ops.ztok.lora_linear.backend in recorder.ops
    with FakeTensorMode():
        assert isinstance(ops.lora_linear(*lora_arguments(torch.empty)), FakeTensor)
    x = plain[0].clone().requires_grad_()
    assert ops.lora_linear(x, *plain[1:]).grad_fn is not None
    with torch.no_grad():
        assert ops.lora_linear(x, *plain[1:]).grad_fn is None
    rows = torch.stack([plain[0], -plain[0]])
    torch.testing.assert_close(torch.func.vmap(lambda x: ops.lora_linear(x, *plain[1:]))(rows)[0], expected)
    traced = make_fx(lambda x: ops.lora_linear(x, *plain[1:]))(plain[0])
    assert torch.ops.ztok.lora_linear.backend in [node.target for node in traced.graph.nodes]
