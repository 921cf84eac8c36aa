"""The LoRA linear layer over every backend present: what `test_every_op.py` does not ask of it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.ops.conftest import dtypes_of
from tests.ops.tolerances import DTYPES, assert_close
from ztok_fast import native, ops
from ztok_fast.ops.lora.lora_linear import LORA_LINEAR, LORA_LINEAR_BACKWARD

NAMES = ("x", "weight", "bias", "A", "B")


@pytest.fixture
def widest(backend):
    """The widest dtype that the backend takes."""
    return dtypes_of("lora_linear", backend)[-1]


def layer(num_rows=6, width=4, out=5, num_adapters=3, rank=2, dtype=torch.float32, adapter_dtype=None, device="cpu"):
    """Random arguments; the tensors of `NAMES` require gradients."""
    adapter_dtype = adapter_dtype or dtype

    def make(*shape, dtype=dtype):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    scaling_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": make(num_rows, width),
        "weight": make(out, width),
        "bias": make(out),
        "A": make(num_adapters, rank, width, dtype=adapter_dtype),
        "B": make(num_adapters, out, rank, dtype=adapter_dtype),
        "scaling": torch.tensor([2.0, 0.5, -1.0], dtype=scaling_dtype, device=device)[:num_adapters],
        "adapters": torch.randint(-1, num_adapters, (num_rows,), dtype=torch.int32, device=device),
    }


def double(arguments):
    """The same arguments in float64, with gradients of their own."""
    return {
        k: v.detach().double().requires_grad_(v.requires_grad) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in arguments.items()
    }


def by_loop(x, weight, bias, A, B, scaling, adapters, cu_seqlens=None):
    """The layer row by row, differentiable."""
    rows = []
    for m in range(x.shape[0]):
        if adapters is None:
            adapter = 0
        elif cu_seqlens is None:
            adapter = int(adapters[m])
        else:
            sequence = max(b for b in range(len(cu_seqlens) - 1) if int(cu_seqlens[b]) <= m)
            adapter = int(adapters[sequence])
        row = weight @ x[m] + (0 if bias is None else bias)
        if adapter >= 0:
            row = row + scaling[adapter] * (B[adapter] @ (A[adapter] @ x[m]))
        rows.append(row)
    return torch.stack(rows) if rows else x.new_empty(0, weight.shape[0])


def check_against_loop(arguments):
    """Forward and all gradients against the float64 loop."""
    exact = double(arguments)
    y, expected = ops.lora_linear(**arguments), by_loop(**exact)
    assert y.dtype == arguments["x"].dtype
    # Half precision loses what it rounds before sums cancel, hence the wider absolute tolerance.
    assert_close(y, expected, scale=4.0)
    if expected.numel() == 0:
        return
    grad = torch.randn(expected.shape).to(y.device, y.dtype)
    y.backward(grad)
    expected.backward(grad.double())
    for name in NAMES:
        if arguments[name] is None or exact[name].grad is None:
            continue
        actual = arguments[name].grad
        assert actual.dtype == arguments[name].dtype
        assert_close(actual, exact[name].grad, dtype=y.dtype, scale=8.0)


@pytest.mark.op("lora_linear")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("choice", ["rows", "sequences", "single", "none"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_equals_loop(backend, device, dtype, choice, with_bias):
    arguments = layer(num_rows=7, dtype=dtype, num_adapters=1 if choice == "single" else 3, device=device)
    if not with_bias:
        arguments["bias"] = None
    if choice == "sequences":
        arguments["cu_seqlens"] = torch.tensor([0, 2, 2, 6, 7], device=device)
        arguments["adapters"] = torch.tensor([2, 1, -1, 0], dtype=torch.int32, device=device)
    elif choice == "single":
        arguments["adapters"] = None
    elif choice == "none":
        arguments["adapters"] = torch.full((7,), -1, dtype=torch.int32, device=device)
    check_against_loop(arguments)


@pytest.mark.op("lora_linear")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters_on_a_half_precision_base(backend, device, dtype):
    check_against_loop(layer(dtype=dtype, adapter_dtype=torch.float32, device=device))


@pytest.mark.op("lora_linear")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 4), max_size=5),
    width=st.integers(1, 5),
    out=st.integers(1, 5),
    rank=st.integers(1, 4),
    num_adapters=st.integers(1, 3),
    offset_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_ragged_sequences(backend, widest, device, lengths, width, out, rank, num_adapters, offset_dtype):
    arguments = layer(sum(lengths), width, out, num_adapters, rank, widest, device=device)
    arguments["adapters"] = torch.randint(-1, num_adapters, (len(lengths),), dtype=torch.int32, device=device)
    arguments["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(device, offset_dtype)
    check_against_loop(arguments)


@pytest.mark.op("lora_linear")
def test_views_as_input(backend, widest, device):
    arguments = layer(num_rows=4, width=6, out=6, dtype=widest, device=device)
    arguments["x"] = torch.randn(6, 4, dtype=widest, device=device).T.requires_grad_()
    arguments["A"] = torch.randn(6, 2, 3, dtype=widest, device=device).permute(2, 1, 0).requires_grad_()
    check_against_loop(arguments)


@pytest.mark.op("lora_linear")
def test_no_rows_have_zero_gradients(backend, device):
    arguments = layer(num_rows=0, device=device)
    ops.lora_linear(**arguments).sum().backward()
    for name in NAMES:
        assert arguments[name].grad.shape == arguments[name].shape
        assert not arguments[name].grad.any()


@pytest.mark.op("lora_linear")
@pytest.mark.dtype(torch.float64)
def test_gradcheck(backend, device):
    arguments = layer(num_rows=3, width=2, out=3, num_adapters=2, dtype=torch.float64, device=device)
    arguments["adapters"] = torch.tensor([1, -1, 0], dtype=torch.int32, device=device)
    inputs = [arguments.pop(name) for name in NAMES]
    assert torch.autograd.gradcheck(lambda *tensors: ops.lora_linear(*tensors, **arguments), inputs)
    assert torch.autograd.gradgradcheck(lambda *tensors: ops.lora_linear(*tensors, **arguments), inputs)


class Allocations(TorchDispatchMode):
    """Records the sizes of the tensors made while it is entered, views left out."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        self.sizes += [
            t.numel() for t in tree_leaves(result) if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in given
        ]
        return result


@pytest.mark.op("lora_linear")
def test_a_frozen_weight_costs_no_tensor_of_its_size(backend, device):
    tensors = layer(num_rows=2, width=40, out=30, dtype=torch.bfloat16, adapter_dtype=torch.float32, device=device)
    tensors.pop("bias")
    x, weight, A, B, scaling, adapters = tensors.values()
    forward = (x, weight, None, A, B, scaling, adapters, None)
    backward = (x, x, weight, A, B, scaling, adapters, None, [True, False, False, True, True])
    own = backend if LORA_LINEAR_BACKWARD.has(backend) else "reference"
    with torch.no_grad(), Allocations() as allocations:
        y = LORA_LINEAR.run(LORA_LINEAR.choose(forward, backend), forward)
        backward = (y, *backward[1:])
        LORA_LINEAR_BACKWARD.run(LORA_LINEAR_BACKWARD.choose(backward, own), backward)
    assert 0 < max(allocations.sizes) < weight.numel()


@pytest.mark.op("lora_linear")
def test_only_the_gradients_asked_for(backend, device):
    for trained in ("x", "A", "B", "weight", "bias"):
        arguments = layer(device=device)
        for name in NAMES:
            arguments[name].requires_grad_(name == trained)
        expected = double(arguments)
        ops.lora_linear(**arguments).square().sum().backward()
        by_loop(**expected).square().sum().backward()
        for name in NAMES:
            assert (arguments[name].grad is not None) == (name == trained)
        assert_close(arguments[trained].grad, expected[trained].grad)


@pytest.mark.op("lora_linear")
def test_repeatable(backend, device):
    def run():
        torch.manual_seed(1)
        arguments = layer(num_rows=60, width=32, out=48, rank=8, dtype=torch.float32, device=device)
        y = ops.lora_linear(**arguments)
        y.square().sum().backward()
        return [y, *(arguments[name].grad for name in NAMES)]

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


@pytest.mark.op("lora_linear")
def test_autocast_casts_the_base_layer(backend, device):
    arguments = layer(dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = ops.lora_linear(**arguments)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(arguments[name].grad.dtype == torch.float32 for name in NAMES)
    assert_close(y, by_loop(**double(arguments)), scale=4.0)


@pytest.mark.op("lora_linear_backward")
@pytest.mark.parametrize("needs", [[True] * 5, [False] * 5, [True, False, False, True, True]], ids=str)
def test_backward_opcheck(backend, device, needs):
    arguments = layer(dtype=torch.float32, device=device)
    grad = torch.randn(6, 5, device=device)
    x, weight, _, *others = (v.detach() for v in arguments.values())
    torch.library.opcheck(torch.ops.ztok.lora_linear_backward.default, (grad, x, weight, *others, None, needs))


@pytest.mark.op("lora_linear")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6)}, r"x must be a tensor \[M, in\]"),
        ({"x": torch.zeros(6, 4, dtype=torch.int64)}, "x must be of dtype"),
        ({"weight": torch.zeros(5, 3)}, "weight must be of size 4 in dimension 1"),
        ({"weight": torch.zeros(5, 4).double()}, "weight must be of the dtype of x .torch.float32"),
        ({"bias": torch.zeros(4)}, "bias must be of size 5"),
        ({"bias": torch.zeros(5).half()}, "bias must be of the dtype of x .torch.float32"),
        ({"A": torch.zeros(2, 4)}, r"A must be a tensor \[n, r, in\]"),
        ({"A": torch.zeros(3, 2, 5)}, "A must be of size 4 in dimension 2"),
        ({"A": torch.zeros(3, 0, 4)}, "A must be not empty"),
        ({"A": torch.zeros(3, 2, 4).half()}, "A must be of dtype float32"),
        ({"B": torch.zeros(2, 5, 2)}, "B must be of size 3 in dimension 0"),
        ({"B": torch.zeros(3, 4, 2)}, "B must be of size 5 in dimension 1"),
        ({"B": torch.zeros(3, 5, 1)}, "B must be of size 2 in dimension 2"),
        ({"B": torch.zeros(3, 5, 2).double()}, "B must be of the dtype of A .torch.float32"),
        ({"scaling": torch.zeros(2)}, "scaling must be of size 3"),
        ({"scaling": torch.zeros(3, dtype=torch.float64)}, "scaling must be of dtype float32"),
        ({"scaling": torch.zeros(3, requires_grad=True)}, "scaling must be a constant"),
        ({"adapters": None}, "adapters must be an int32 tensor, because A holds 3 adapters"),
        ({"adapters": torch.zeros(5, dtype=torch.int32)}, "adapters must be of size 6"),
        ({"adapters": torch.zeros(6, dtype=torch.int64)}, "adapters must be of dtype int32"),
        ({"adapters": torch.full((6,), 3, dtype=torch.int32)}, r"adapters must be in \[-1, 3\) .*got 3"),
        ({"adapters": torch.full((6,), -2, dtype=torch.int32)}, r"adapters must be in \[-1, 3\) .*got -2"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "adapters must be of size 1"),
        ({"cu_seqlens": torch.tensor([0, 1, 2, 3, 4, 5, 7])}, "cu_seqlens must be 6 in its last element"),
        ({"cu_seqlens": torch.zeros(7)}, "cu_seqlens must be of dtype int32, int64"),
    ],
)
def test_bad_input(backend, device, change, message):
    arguments = {**layer(dtype=torch.float32), **change}
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=f"lora_linear: {message}"):
        ops.lora_linear(**arguments)


@pytest.mark.op("lora_linear")
def test_cu_seqlens_need_adapters(backend, device):
    arguments = layer(num_adapters=1, device=device)
    arguments["adapters"] = None
    with pytest.raises(ValueError, match="lora_linear: cu_seqlens must be None where adapters is None"):
        ops.lora_linear(**arguments, cu_seqlens=torch.tensor([0, 6], device=device))


@pytest.mark.op("lora_linear")
def test_the_outputs_of_a_layer_are_not_kept_for_its_backward_pass(backend, device):
    """They would cost the memory of every layer of a model in training."""
    arguments = layer(device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.lora_linear(**arguments)
    assert kept and y.data_ptr() not in {t.data_ptr() for t in kept}


def test_few_rows_go_to_the_decode_kernel_unless_the_weight_is_transposed():
    """The decode kernel of a GPU would copy a transposed weight at every call."""
    condition = next(b.condition[1] for b in LORA_LINEAR.backends if b.name == "cuda")
    x, weight, many = torch.zeros(64, 4), torch.zeros(8, 4), torch.zeros(65, 4)
    assert [condition(*args) for args in ((x, weight), (x, weight.T.contiguous().T), (many, weight))] == [
        True, False, False,
    ]  # fmt: skip
    assert [b.name for b in LORA_LINEAR.backends] == ["cpp", "cuda", "triton", "reference"]


@pytest.mark.skipif(not native.status("cuda").available, reason="no compiled CUDA library")
def test_the_registered_cuda_kernel_says_what_takes_more_rows():
    """Its host code looks at the number of rows first, so that tensors of the CPU will do."""
    kernel, on_cuda = torch.ops.ztok.lora_linear.default, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for rows, message in (
        (64, "lora_linear: x: expected a CUDA tensor"),
        (65, r"lora_linear: x: .* at most 64 rows, got 65; ztok_fast\.ops\.lora_linear and .* choose another"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernel.redispatch(on_cuda, *layer(num_rows=rows).values(), None)


@pytest.mark.op("lora_linear")
def test_values_are_checked_with_gradients_too(backend, device):
    arguments = layer(device="cpu", num_adapters=2)
    arguments["adapters"][3] = 2
    with pytest.raises(ValueError, match=r"lora_linear: adapters must be in \[-1, 2\) .*got 2"):
        ops.lora_linear(**arguments)
