"""`lora_linear` over the shapes that backends treat differently: few rows and many, ranks, depths, layouts, threads."""

import pytest
import torch

from tests.ops.conftest import dtypes_of, skip_beyond_rows
from tests.ops.test_lora import NAMES
from tests.ops.tolerances import assert_close
from ztok_fast import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.op("lora_linear")


@pytest.fixture(autouse=True)
def leave_out_interpreted_kernels(request, backend, device):
    """They are slow; `test_lora_tiles.py` has the sizes that matter to them, but not the many adapters."""
    if backend == "triton" and device == "cpu" and request.node.originalname != "test_numbers_of_adapters":
        pytest.skip("interpreted: see test_lora_tiles.py")


def layer(num_rows, width, out, rank, num_adapters=3, dtype=torch.float32, adapter_dtype=None, device="cpu"):
    """Arguments whose results are of order 1 whatever the width, adapters unsorted with -1 among them."""

    def make(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    adapter_dtype = adapter_dtype or dtype
    return {
        "x": make(num_rows, width),
        "weight": make(out, width, scale=width**-0.5),
        "bias": make(out),
        "A": make(num_adapters, rank, width, scale=width**-0.5, dtype=adapter_dtype),
        "B": make(num_adapters, out, rank, scale=rank**-0.5, dtype=adapter_dtype),
        "scaling": torch.linspace(-1, 2, num_adapters, device=device),
        "adapters": torch.randint(-1, num_adapters, (num_rows,), dtype=torch.int32, device=device),
    }


def exact(x, weight, bias, A, B, scaling, adapters):
    """The float64 answer, differentiable; A, B and scaling of every row gathered by its adapter."""
    chosen = adapters.long().clamp(min=0)
    scale = torch.where(adapters < 0, 0.0, scaling[chosen])
    low = torch.einsum("mi,mri->mr", x, A[chosen]) * scale[:, None]
    return x @ weight.T + bias + torch.einsum("mr,mor->mo", low, B[chosen])


def check(arguments):
    wide = {k: v.detach().double().requires_grad_() if k in NAMES else v for k, v in arguments.items()}
    expected = exact(**{**wide, "scaling": arguments["scaling"].double()})
    y = ops.lora_linear(**arguments)
    assert_close(y, expected, scale=4.0)
    # Of order 1 / rows, so that sums over rows stay of order 1.
    grad = (torch.randn(expected.shape, device=y.device) / len(y) ** 0.5).to(y.dtype)
    y.backward(grad)
    expected.backward(grad.double())
    for name in NAMES:
        assert_close(arguments[name].grad, wide[name].grad, dtype=y.dtype, scale=8.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 13, 64])
def test_rows(backend, device, num_rows, dtype):
    check(layer(num_rows, 72, 104, 8, dtype=dtype, device=device))


@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("rank", [1, 4, 7, 16, 33, 64, 256])
def test_ranks(backend, device, rank, num_rows):
    check(layer(num_rows, 40, 48, rank, device=device))


@pytest.mark.parametrize("num_rows", [2, 17])
@pytest.mark.parametrize(("width", "out"), [(1, 1), (7, 3), (1023, 33), (1025, 65), (2100, 31), (9, 203)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_sizes(backend, device, dtype, width, out, num_rows):
    check(layer(num_rows, width, out, 5, dtype=dtype, device=device))


@pytest.mark.parametrize("num_rows", [2, 36])
def test_long_sums(backend, device, num_rows):
    """Some results cancel to almost 0: one chain of float32 additions over 8192 products is too far off for them."""
    arguments = layer(num_rows, 8192, 400, 16, device=device)
    arguments["x"] = arguments["x"].detach() * 1.5
    wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in arguments.items()}
    assert_close(ops.lora_linear(**arguments), exact(**wide), scale=4.0)


@pytest.mark.parametrize("num_rows", [1, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters(backend, device, dtype, num_rows):
    check(layer(num_rows, 50, 70, 12, dtype=dtype, adapter_dtype=torch.float32, device=device))


def test_more_rows_than_are_made_float32_at_a_time(backend, device):
    skip_beyond_rows("lora_linear", backend, 2500)
    check(layer(2500, 24, 20, 4, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("num_adapters", [1, 40])
def test_numbers_of_adapters(backend, device, num_adapters):
    check(layer(50, 20, 24, 3, num_adapters=num_adapters, device=device))


@pytest.mark.parametrize("num_rows", [3, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend, device, dtype, num_rows):
    """A transposed weight (GPT-2's), and every argument as a view."""
    arguments = layer(num_rows, 36, 44, 6, dtype=dtype, device=device)
    arguments["weight"] = arguments["weight"].detach().T.contiguous().T.requires_grad_()
    if backend == "cuda":
        with pytest.raises(ops.BackendUnavailable, match="inputs lie closer together"):
            ops.lora_linear(**arguments)
        arguments["weight"] = arguments["weight"].detach().contiguous().requires_grad_()
    check(arguments)
    for name in ("x", "weight", "bias", "A", "B"):
        value = arguments[name].detach()
        spread = torch.full((*value.shape, 2), torch.nan, dtype=dtype, device=device)
        spread[..., 0] = value
        arguments[name] = spread[..., 0].requires_grad_()
    check(arguments)


def test_a_transposed_weight_costs_no_copy(backend, device):
    """Read in place, a column range of a wider matrix gives the same as its copy."""
    if backend == "cuda":
        pytest.skip("the kernel for few rows does not take it")
    arguments = layer(20, 36, 44, 6, device=device)
    wide = torch.randn(36, 60, device=device)
    arguments["weight"] = wide[:, :44].T
    y = ops.lora_linear(**arguments)
    arguments["weight"] = wide[:, :44].T.contiguous()
    assert_close(y, ops.lora_linear(**arguments).double(), scale=4.0)


@pytest.mark.parametrize("num_rows", [4, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_see_other_adapters(backend, device, dtype, num_rows):
    arguments = layer(num_rows, 40, 40, 8, dtype=dtype, device=device)
    arguments["adapters"] = torch.tensor([0, -1, 2, -1], dtype=torch.int32, device=device).repeat(num_rows // 4)
    expected = ops.lora_linear(**arguments)
    for name in ("A", "B"):
        arguments[name] = arguments[name].detach().clone()
        arguments[name][1] = torch.inf
        arguments[name].requires_grad_()
    actual = ops.lora_linear(**arguments)
    assert torch.equal(actual, expected)
    actual.float().square().sum().backward()
    assert arguments["x"].grad.isfinite().all()
    assert not arguments["A"].grad[1].any() and not arguments["B"].grad[1].any()


@pytest.mark.parametrize("num_rows", [3, 48])
def test_a_row_does_not_depend_on_the_others(backend, device, num_rows):
    """A row of NaN stays a row of NaN, and the other rows what they were."""
    arguments = layer(num_rows, 40, 40, 8, device=device)
    expected = ops.lora_linear(**arguments)
    arguments["x"] = arguments["x"].detach().clone()
    arguments["x"][1] = torch.nan
    actual = ops.lora_linear(**arguments)
    assert actual[1].isnan().all()
    rest = torch.arange(num_rows, device=device) != 1
    assert torch.equal(actual[rest], expected[rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 4, 150])
def test_the_number_of_threads_does_not_show(backend, device, num_rows, dtype):
    if backend != "cpp":
        pytest.skip("says something of compiled CPU code only")

    def run():
        torch.manual_seed(3)
        arguments = layer(num_rows, 700, 900, 16, dtype=dtype)
        y = ops.lora_linear(**arguments)
        y.backward(torch.randn(y.shape).to(dtype))
        return [y, *(arguments[name].grad for name in NAMES)]

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("num_rows", [2, 30])
@pytest.mark.parametrize("isa", [0, 1, 2], ids=["baseline", "avx2", "avx512"])
def test_instruction_sets(backend, device, isa, num_rows):
    if backend != "cpp":
        pytest.skip("the compiled CPU library has one version per instruction set")
    before = torch.ops.ztok.isa_native(-1)
    try:
        if torch.ops.ztok.isa_native(isa) != isa:
            pytest.skip("not on this processor")
        for dtype in dtypes_of("lora_linear", backend):
            check(layer(num_rows, 75, 70, 9, dtype=dtype))
    finally:
        torch.ops.ztok.isa_native(before)
