"""Backends of backward passes, under `torch.compile`, modes and subclasses, and what lies on the way to a kernel."""

import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import ztok_fast
from tests.ops.marked_backend import (
    ASSIGN,
    MARKED,
    MARKED_GRADIENT,
    REFERENCE,
    REFERENCE_GRADIENT,
    assign,
    distances,
    gradient,
    marked,
    marked_backward,
    nothing_forced,
)
from ztok_fast import native, ops
from ztok_fast.ops import checks
from ztok_fast.ops.backends import BackendUnavailable
from ztok_fast.ops.op import OPS

__all__ = ["marked", "marked_backward", "nothing_forced"]  # fixtures


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


def test_a_forced_backend_has_no_forward_mode():
    """Neither of the public op nor of both registered ones: each would run the reference without a word."""
    x, codebook, raw = torch.randn(3, 4), torch.randn(5, 4), torch.ops.ztok.codebook_assign
    calls = {
        "public": lambda x: ops.codebook_assign(x, codebook).distances,
        "default": lambda x: raw(x, codebook, "l2")[0],
        "chosen": lambda x: raw.backend(x, codebook, "l2", "")[0],
        "named": lambda x: raw.backend(x, codebook, "l2", "cpp")[0],
        "reference": lambda x: raw.backend(x, codebook, "l2", "reference")[0],
    }
    message = "codebook_assign: forward-mode .* run the reference, but cpp is forced"
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = {}
        for name, call in calls.items():
            if name == "named":
                with pytest.raises(BackendUnavailable, match=message):
                    call(dual)
            else:
                tangents[name] = torch.autograd.forward_ad.unpack_dual(call(dual)).tangent
            if name in ("public", "default", "chosen"):
                with ztok_fast.backend("cpp"), pytest.raises(BackendUnavailable, match=message):
                    call(dual)
    for tangent in tangents.values():
        assert tangent.abs().min() > 0
        torch.testing.assert_close(tangent, tangents["public"])


def test_strided_input_gives_what_the_fake_kernels_say():
    x, codebooks = torch.randn(4, 6).T, torch.randn(4, 5, 2).permute(2, 1, 0)
    result = torch.ops.ztok.residual_quantize(x, codebooks, None)
    assert all(t.is_contiguous() for t in result)
    torch.library.opcheck(torch.ops.ztok.residual_quantize.default, (x, codebooks.requires_grad_(), None))
    gradients = torch.ops.ztok.residual_quantize_backward(x, codebooks.detach(), result[3], x, *result[1:3])
    assert all(t.is_contiguous() for t in gradients)


# --- the way to a kernel

MOST_FRAMES = 3
CPP = [name for name, op in OPS.items() if op.spec and any(b.name == "cpp" and b.compiled for b in op.backends)]


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
