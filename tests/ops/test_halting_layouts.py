"""Halting and integration on layouts and widths that kernels with tiles, vectors and threads have to get right."""

import pytest
import torch

import ztok_fast
from tests.ops.test_halting import check, offsets, random_mass
from tests.ops.tolerances import assert_close
from ztok_fast import native, ops
from ztok_fast.ops.op import OPS

LAYOUTS = {
    "no sequence": ([], None),
    "empty sequences alone": ([0] * 9, None),
    "many empty sequences": ([0] * 70 + [3] + [0] * 70 + [1, 0, 2], None),
    "every row fires": ([33, 1, 70], 1.0),
    "no row fires": ([5, 0, 600], 0.0),
    "one row in each": ([1] * 150, None),
    "longer than a tile": ([700, 2, 1300], None),
}


@pytest.mark.op("halting_units")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["fire", "stop"])
@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64])
def test_layouts(backend, device, layout, mode, offset_dtype):
    lengths, value = LAYOUTS[layout]
    if (backend, device) == ("triton", "cpu"):  # the interpreter's tiles are small, and so is its speed
        lengths = [length if length < 100 else length // 10 for length in lengths]
    mass = random_mass(lengths) if value is None else torch.full((sum(lengths),), value)
    mass = mass.to(device).requires_grad_()
    cu_seqlens = offsets(lengths, device, offset_dtype)
    units = ops.halting_units(mass, cu_seqlens, 1.0, mode)
    check(units, mass.detach(), lengths, 1.0, mode)

    direction = torch.randn(sum(lengths), 2, device=device)
    (got,) = torch.autograd.grad(units.weights, mass, direction)
    with ztok_fast.backend("reference"):
        wide = mass.detach().double().requires_grad_()
        weights = ops.halting_units(wide, cu_seqlens, 1.0, mode).weights
        (expected,) = torch.autograd.grad(weights, wide, direction.double())
    # a gradient is a sum over up to the rest of its sequence
    assert_close(got, expected, scale=10)


def integrate_and_differentiate(rows, mass, cu_seqlens, mode, direction):
    rows, mass = rows.clone().requires_grad_(), mass.clone().requires_grad_()
    units = ops.halting_units(mass, cu_seqlens, 1.0, mode)
    weights = units.weights.detach().requires_grad_()
    means = ops.integrate_units(rows, units._replace(weights=weights), direction.shape[0])
    return means, *torch.autograd.grad(means, (rows, weights), direction.to(means.dtype))


@pytest.mark.op("integrate_units")
@pytest.mark.parametrize("mode", ["fire", "stop"])
@pytest.mark.parametrize("width", [1, 31, 64, 67, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widths(backend, device, width, dtype, mode):
    lengths = [9, 0, 1, 40, 2] if (backend, device) != ("triton", "cpu") else [9, 0, 2]
    mass, cu_seqlens = random_mass(lengths).to(device), offsets(lengths, device)
    rows = torch.randn(sum(lengths), width).to(dtype).to(device)
    direction = torch.randn(sum(lengths), width).to(dtype).to(device)
    got = integrate_and_differentiate(rows, mass, cu_seqlens, mode, direction)
    with ztok_fast.backend("reference"):
        expected = integrate_and_differentiate(rows.double(), mass, cu_seqlens, mode, direction.double())
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32]
    # the means that the backward pass is given are rounded to the dtype of the rows; sums over the width of products
    for actual, wanted, scale in zip(got, expected, (4, 10, 10 * width**0.5), strict=True):
        assert_close(actual, wanted, dtype, scale=scale)
    again = integrate_and_differentiate(rows, mass, cu_seqlens, mode, direction)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.op("integrate_units")
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_units_past_the_total_are_dropped_where_values_are_not_checked(backend, device, index_dtype, monkeypatch):
    if backend == "cpp":
        pytest.skip("always checks its values")
    monkeypatch.setattr(OPS["integrate_units"], "check_values", lambda *args: None)
    mass, cu_seqlens = torch.full((12,), 0.6, device=device), offsets([12], device)
    units = ops.halting_units(mass, cu_seqlens)
    units = units._replace(unit=units.unit.to(index_dtype), cu_units=units.cu_units.to(index_dtype))
    rows = torch.randn(12, 5, device=device, requires_grad=True)
    whole = ops.integrate_units(rows, units, 8)
    cut = ops.integrate_units(rows, units, 3)
    assert torch.equal(cut, whole[:3])
    (grad,) = torch.autograd.grad(cut.sum(), rows)
    (expected,) = torch.autograd.grad(whole[:3].sum(), rows)
    assert_close(grad, expected)


@pytest.mark.skipif(not native.status("cpu").available, reason=native.status("cpu").reason)
@pytest.mark.parametrize("isa", [0, 1, 2])
def test_every_instruction_set(isa):
    """What the chosen kernels are not: the others that this processor has."""
    lengths, width = [9, 0, 1, 40], 77
    mass, cu_seqlens = random_mass(lengths), offsets(lengths)
    rows, direction = torch.randn(50, width), torch.randn(50, width)
    expected = integrate_and_differentiate(rows.double(), mass, cu_seqlens, "fire", direction.double())
    best = torch.ops.ztok.isa_native(-1)
    try:
        if torch.ops.ztok.isa_native(isa) != isa:
            pytest.skip("this processor has no such instructions")
        with ztok_fast.backend("cpp"):
            got = integrate_and_differentiate(rows, mass, cu_seqlens, "fire", direction)
    finally:
        torch.ops.ztok.isa_native(best)
    for actual, wanted in zip(got, expected, strict=True):
        assert_close(actual, wanted, scale=20)


@pytest.mark.skipif(not native.status("cpu").available, reason=native.status("cpu").reason)
@pytest.mark.parametrize("lengths", [[100_000], [0, 60_000, 3, 39_997]])
def test_long_sequences_in_threads(lengths):
    mass, cu_seqlens = random_mass(lengths), offsets(lengths)
    rows, direction = torch.randn(100_000, 24), torch.randn(100_000, 24)
    results = []
    for backend in ("cpp", "reference"):
        with ztok_fast.backend(backend):
            units = ops.halting_units(mass, cu_seqlens)
            results.append((*units, *integrate_and_differentiate(rows, mass, cu_seqlens, "fire", direction)))
    for got, expected in zip(*results, strict=True):
        if got.dtype == torch.float32:
            assert_close(got, expected, scale=20)
        else:
            assert torch.equal(got, expected)
    assert torch.equal(results[0][2], results[1][2]), "weights are the same to the last bit"
