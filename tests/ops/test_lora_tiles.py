"""The LoRA linear layer at sizes that kernels cut into tiles, over every backend present; and what only a GPU shows."""

import pytest
import torch

from tests.ops.conftest import skip_beyond_rows
from tests.ops.tolerances import assert_close
from ztok_fast import ops
from ztok_fast.ops.lora import reference
from ztok_fast.ops.lora.lora_linear import LORA_LINEAR, LORA_LINEAR_BACKWARD

NEEDS = [True] * 5


def layer(rows, width, out, rank, order="random", dtype=torch.float32, adapter_dtype=None, device="cpu"):
    """Arguments of size about one, so that a tolerance means the same at every width."""
    adapter_dtype = adapter_dtype or dtype
    adapters = torch.randint(-1, 3, (rows,), dtype=torch.int32)
    if order == "sorted":
        adapters = adapters.sort().values
    return {
        "x": torch.randn(rows, width, device=device).to(dtype),
        "weight": (torch.randn(out, width, device=device) / width**0.5).to(dtype),
        "bias": torch.randn(out, device=device).to(dtype),
        "A": (torch.randn(3, rank, width, device=device) / width**0.5).to(adapter_dtype),
        "B": (torch.randn(3, out, rank, device=device) / rank**0.5).to(adapter_dtype),
        "scaling": torch.tensor([2.0, 0.5, -1.0], device=device),
        "adapters": adapters.to(device),
    }


def exact(tensors):
    return [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in tensors]


def check(arguments):
    """Forward and gradients against the reference in float64."""
    values = [*arguments.values(), None]
    x, weight, _, *others = values
    y = LORA_LINEAR(*values)
    assert_close(y, reference.lora_linear(*exact(values)), scale=2.0)
    grad = torch.randn_like(y.float()).to(y.dtype)
    inputs = [grad, x, weight, *others]
    gradients = LORA_LINEAR_BACKWARD(*inputs, NEEDS)
    for actual, expected in zip(gradients, reference.lora_linear_backward(*exact(inputs), NEEDS)):
        # sums over the rows grow with their number: compared at the size of the largest
        size = expected.abs().max().clamp(min=1.0)
        assert_close(actual.double() / size, expected / size, dtype=x.dtype, scale=2.0)


@pytest.mark.op("lora_linear")
@pytest.mark.parametrize(
    ("rows", "width", "out", "rank", "order"),
    [(1, 70, 33, 4, "random"), (17, 64, 130, 20, "random"), (64, 40, 24, 70, "sorted"), (70, 100, 40, 24, "sorted")],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_and_their_edges(backend, device, dtype, rows, width, out, rank, order):
    skip_beyond_rows("lora_linear", backend, rows)
    check(layer(rows, width, out, rank, order, dtype, device=device))


@pytest.mark.op("lora_linear")
def test_more_rows_than_a_chunk(backend, device):
    skip_beyond_rows("lora_linear", backend, 600)
    check(layer(600, 20, 18, 4, "sorted", device=device))


@pytest.mark.op("lora_linear")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters(backend, device, dtype):
    check(layer(20, 64, 48, 16, dtype=dtype, adapter_dtype=torch.float32, device=device))


@pytest.mark.op("lora_linear")
def test_a_low_rank_product_beyond_float16(backend, device):
    arguments = layer(5, 64, 40, 4, dtype=torch.float16, device=device)
    arguments["A"] *= 3e4
    arguments["B"] *= 1e-4
    values = [*arguments.values(), None]
    y = LORA_LINEAR(*values)
    assert y.isfinite().all()
    assert_close(y, reference.lora_linear(*exact(values)), scale=2.0)


@pytest.mark.op("lora_linear")
@pytest.mark.parametrize("rows", [6, 40])
def test_nan_stays_with_its_adapter_and_its_row(backend, device, rows):
    arguments = layer(rows, 48, 40, 8, device=device)
    arguments["adapters"] = (torch.arange(rows, dtype=torch.int32, device=device) % 2) * 2
    clean = ops.lora_linear(**arguments)
    arguments["A"][1] = arguments["B"][1] = torch.nan
    for name in ("x", "A", "B"):
        arguments[name].requires_grad_()
    y = ops.lora_linear(**arguments)
    assert torch.equal(y, clean)
    y.sum().backward()
    assert arguments["x"].grad.isfinite().all()
    for name in ("A", "B"):
        assert not arguments[name].grad[1].any()
    x = arguments["x"].detach().clone()
    x[1] = torch.nan
    y = ops.lora_linear(**{**arguments, "x": x})
    assert y[1].isnan().all()
    others = [0, *range(2, rows)]
    assert torch.equal(y[others], clean[others])


@pytest.mark.gpu
@pytest.mark.op("lora_linear")
@pytest.mark.parametrize("rows", [1, 20, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_of_models(backend, device, rows, dtype):
    if device != "cuda":
        pytest.skip("too large for a CPU test")
    skip_beyond_rows("lora_linear", backend, rows)
    for width, out, rank in ((576, 1536, 16), (4096, 1024, 64), (1024, 4096, 256)):
        check(layer(rows, width, out, rank, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.op("lora_linear")
@pytest.mark.parametrize("rows", [1, 8, 64, 300])
def test_graph_capture(backend, device, rows):
    """No synchronisation, and a replay reads what the inputs hold then."""
    if device != "cuda":
        pytest.skip("graphs are of CUDA")
    skip_beyond_rows("lora_linear", backend, rows)
    arguments = layer(rows, 512, 320, 16, dtype=torch.bfloat16, device=device)
    cu_seqlens = torch.tensor([0, rows // 2, rows], device=device)
    arguments["adapters"] = torch.tensor([1, 2], dtype=torch.int32, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.lora_linear(**arguments, cu_seqlens=cu_seqlens)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.lora_linear(**arguments, cu_seqlens=cu_seqlens)
    for _ in range(3):
        arguments["x"].copy_(torch.randn_like(arguments["x"]))
        arguments["adapters"].copy_(torch.randint(-1, 3, (2,), dtype=torch.int32))
        graph.replay()
        assert torch.equal(y, ops.lora_linear(**arguments, cu_seqlens=cu_seqlens))


@pytest.mark.gpu
@pytest.mark.op("lora_linear")
@pytest.mark.parametrize("rows", [4, 64, 2000])
def test_same_bits_from_run_to_run(backend, device, rows):
    if device != "cuda":
        pytest.skip("the CPU is tested at smaller sizes")
    skip_beyond_rows("lora_linear", backend, rows)
    arguments = layer(rows, 4096, 512, 32, dtype=torch.bfloat16, device=device)
    x, weight, _, *others = arguments.values()
    first = None
    for _ in range(20):
        y = LORA_LINEAR(*arguments.values(), None)
        results = [y, *LORA_LINEAR_BACKWARD(y, x, weight, *others, None, NEEDS)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results))


@pytest.mark.gpu
@pytest.mark.op("lora_linear")
def test_an_adapter_out_of_range_counts_as_none(backend, device):
    """Nothing is checked on a GPU, where it would synchronise, and nothing is read out of bounds."""
    if device != "cuda" or backend == "reference":
        pytest.skip("elsewhere it is an error")
    arguments = layer(9, 64, 40, 8, device=device)
    arguments["adapters"][3] = 3
    y = LORA_LINEAR(*arguments.values(), None)
    arguments["adapters"][3] = -1
    assert torch.equal(y, LORA_LINEAR(*arguments.values(), None))
