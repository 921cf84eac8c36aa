"""`quantize_ragged` on layouts and widths that kernels with tiles, blocks and threads have to get right."""

import pytest
import torch

import ztok_fast
from tests.ops.test_halting import offsets
from tests.ops.tolerances import assert_close
from ztok_fast import ops
from ztok_fast.ops.op import OPS

FLOATS = ("hidden", "mass", "end_weight", "mean_weight", "codebooks")
LAYOUTS = {
    "no sequence": ([], None, 2),
    "empty sequences alone": ([0, 0, 0], None, 1),
    "many empty sequences": ([0] * 40 + [3] + [0] * 40 + [1, 0, 2], None, 3),
    "every row fires": ([33, 1, 5], 1.0, 0),
    "no row fires": ([5, 0, 70], 0.0, 0),
    "one row in each": ([1] * 40, None, 0),
}


def arguments_of(device, lengths, value=None, dtype=torch.float32, width=6, code_width=3, size=7, num_levels=2):
    rows = sum(lengths)
    # sixteenths, off the multiples of the threshold: the units of float64 are those of every dtype
    mass = torch.randint(1, 16, (rows,)) / 16 if value is None else torch.full((rows,), value)
    floats = {
        "hidden": torch.randn(rows, width),
        "end_weight": torch.randn(code_width, width),
        "mean_weight": torch.randn(code_width, width),
        "codebooks": torch.randn(num_levels, size, code_width),
    }
    floats = {name: tensor.to(dtype).to(device) for name, tensor in floats.items()}
    return floats | {"mass": mass.to(device), "cu_seqlens": offsets(lengths, device, torch.int64)}


def run(arguments, total_units, mode="fire", **options):
    """Results, and the gradients of a loss of everything that is differentiable."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in FLOATS}
    result = ops.quantize_ragged(**arguments | leaves, mode=mode, total_units=total_units, **options)
    loss = (result.quantized * 2).sum() + result.latents.sin().sum() + result.units.weights.square().sum()
    loss = loss + 3 * result.commitment + 5 * result.codebook_loss
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return (*result[:-1], *result.units), gradients


def check_against_float64(arguments, total_units, mode, dtype, **options):
    got, gradients = run(arguments, total_units, mode, **options)
    # float64 everywhere but in the mass, whose dtype is that of the weights
    wide = {n: t.double() if t.is_floating_point() and n != "mass" else t for n, t in arguments.items()}
    with ztok_fast.backend("reference"):
        expected, wide_gradients = run(wide, total_units, mode, **options)
    for actual, wanted in zip(got, expected, strict=True):
        if wanted.is_floating_point():
            assert_close(actual, wanted, torch.float32, scale=50)
        else:
            assert torch.equal(actual, wanted)
    for actual, wanted in zip(gradients, wide_gradients, strict=True):
        assert_close(actual, wanted, dtype, scale=100 if dtype == torch.float32 else 10)
    return got, gradients


@pytest.mark.op("quantize_ragged")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["fire", "stop"])
def test_layouts(backend, device, layout, mode):
    lengths, value, spare = LAYOUTS[layout]
    arguments = arguments_of(device, lengths, value)
    count = int(ops.halting_units(arguments["mass"], arguments["cu_seqlens"], 1.0, mode).cu_units[-1])
    levels = torch.arange(len(lengths), device=device) % 3
    check_against_float64(arguments, count + spare, mode, torch.float32, levels=levels)


@pytest.mark.op("quantize_ragged")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width, code_width, num_levels", [(37, 20, 3), (64, 16, 1), (70, 150, 2)])
def test_widths(backend, device, width, code_width, num_levels, dtype):
    shape = {"width": width, "code_width": code_width, "num_levels": num_levels, "size": 13}
    arguments = arguments_of(device, [9, 3], dtype=dtype, **shape)
    got, gradients = check_against_float64(arguments, 12, "fire", dtype)
    again, gradients_again = run(arguments, 12)
    for a, b in zip((*got, *gradients), (*again, *gradients_again), strict=True):
        assert torch.equal(a, b), "bitwise repeatable"


@pytest.mark.op("quantize_ragged")
def test_not_a_number_stays_in_its_sequence(backend, device):
    arguments = arguments_of(device, [4, 5], 0.6)
    clean = ops.quantize_ragged(**arguments, total_units=9)
    arguments["hidden"][:4] = torch.nan
    broken = ops.quantize_ragged(**arguments, total_units=9)
    first = int(broken.units.cu_units[1])
    assert torch.equal(broken.codes[first:], clean.codes[first:])
    assert torch.equal(broken.latents[first:], clean.latents[first:])
    assert broken.commitment.isnan()


@pytest.mark.op("residual_quantize_backward")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, width", [(0, 5), (70, 20), (9, 150)])
def test_residual_backward_matches_float64(backend, device, dtype, rows, width):
    size, num_levels = 11, 3
    latents, direction = (torch.randn(rows, width).to(dtype).to(device) for _ in range(2))
    codebooks = torch.randn(num_levels, size, width).to(dtype).to(device)
    # some rows use fewer levels, and one code is nobody's
    codes = torch.randint(0, size - 1, (rows, num_levels), dtype=torch.int32, device=device)
    unused = torch.arange(num_levels, device=device) >= (torch.arange(rows, device=device) % 4)[:, None]
    codes[unused] = -1
    losses = torch.tensor(3.0, device=device), torch.tensor(5.0, device=device)
    run = OPS["residual_quantize_backward"]
    got = run(latents, codebooks, codes, direction, *losses)
    with ztok_fast.backend("reference"):
        expected = run(latents.double(), codebooks.double(), codes, direction.double(), *losses)
    for actual, wanted in zip(got, expected, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, wanted, scale=10)
    again = run(latents, codebooks, codes, direction, *losses)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", ["halting_units", "quantize_ragged"])
def test_graph_capture_and_memory(op):
    """No host synchronisation: a captured run gives what an eager one gave. No padded copy: memory grows with units."""
    triton = next(backend for backend in OPS[op].backends if backend.name == "triton")
    missing = list(triton.unmet(torch.device("cuda")))
    if missing:
        pytest.skip("; ".join(missing))
    arguments = arguments_of("cuda", [300, 0, 5000], width=512, code_width=64, size=256)
    call = {
        "halting_units": lambda: ops.halting_units(arguments["mass"], arguments["cu_seqlens"]),
        "quantize_ragged": lambda: ops.quantize_ragged(**arguments, total_units=4000)[:-1],
    }[op]
    with ztok_fast.backend("triton"):
        expected = call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        assert torch.cuda.max_memory_allocated() - before < 64 * 2**20
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        graph.replay()
        for got, wanted in zip(captured, expected, strict=True):
            assert torch.equal(got, wanted)
