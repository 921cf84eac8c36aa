"""`ragged_layout` and `ragged_scatter_add` over every backend present."""

import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.ragged_cases import CU, RAGGED, gathered_by_loop, offsets, sources
from tests.ops.tolerances import assert_close
from ztok_fast import ops
from ztok_fast.ops.ragged import reference


@pytest.mark.op("ragged_layout")
@RAGGED
@given(spec=sources())
def test_layout_places_and_finds_rows(backend, device, spec):
    lengths = [source_lengths for source_lengths, _ in spec]
    totals = [sum(n) for n in lengths]
    layout = ops.ragged_layout([offsets(n, device=device) for n in lengths], totals)
    tags = [torch.tensor([[i, k] for k in range(t)], device=device).reshape(t, 2) for i, t in enumerate(totals)]
    placed = layout.place(tags)
    _, origins = gathered_by_loop([torch.zeros(t, 1) for t in totals], [None] * len(totals), lengths)
    assert [tuple(row) for row in placed.tolist()] == origins
    for tag, destination in zip(tags, layout.destinations):
        assert torch.equal(placed[destination], tag)


@pytest.mark.op("ragged_layout")
def test_gradient_of_place(backend, device):
    cu_seqlens = [offsets([1, 0, 2], device=device), offsets([0, 2, 1], device=device)]
    parts = [torch.randn(3, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *parts: ops.ragged_layout(cu_seqlens, [3, 3]).place(parts), parts)


@pytest.mark.op("ragged_layout")
@pytest.mark.parametrize(
    ("cu_seqlens", "totals", "message"),
    [
        ([], [], "cu_seqlens must be a list of at least one"),
        ([CU], [3, 3], "totals must be a list of 1 integers"),
        ([CU, CU], [3, -1], r"totals\[1\] must be an integer of at least 0"),
        ([CU, CU], [3, 4], r"cu_seqlens\[1\] must be 4 in its last element"),
        ([CU, CU[:2]], [3, 1], r"cu_seqlens\[1\] must be of size 3"),
    ],
)
def test_layout_bad_input(backend, device, value_checks, cu_seqlens, totals, message):
    with pytest.raises(ValueError, match=f"ragged_layout: {message}"):
        ops.ragged_layout([cu.to(device) for cu in cu_seqlens], totals)


# ---- ragged_scatter_add


@pytest.mark.op("ragged_scatter_add")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_added", [0, 1, 3000])
def test_scatter_add_sums_exactly_and_repeatably(backend, device, dtype, num_added):
    rows = torch.randn(num_added, 4, device=device).to(dtype)
    index = torch.randint(0, 7, (num_added,), device=device)
    actual = ops.ragged_scatter_add(rows, index, 9)
    expected = torch.zeros(9, 4, dtype=torch.float64, device=device)
    for i in range(7):
        expected[i] = rows[index == i].double().sum(0)
    assert actual.dtype == dtype
    assert_close(actual, expected, scale=4.0)
    assert all(torch.equal(ops.ragged_scatter_add(rows, index, 9), actual) for _ in range(3))


@pytest.mark.op("ragged_scatter_add")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 577])
@pytest.mark.parametrize("num_rows", [1, 5, 4000])
def test_scatter_add_of_every_width(backend, device, dtype, width, num_rows):
    """One row that gets everything, few, and mostly empty ones; whole and part vectors; strided input."""
    rows = torch.randn(300, width + 3, device=device).to(dtype)[:, 1 : width + 1]
    index = torch.randint(0, num_rows, (300,), device=device, dtype=torch.int32)
    expected = torch.zeros(num_rows, width, dtype=torch.float64, device=device).index_add_(0, index, rows.double())
    assert_close(ops.ragged_scatter_add(rows, index, num_rows), expected, scale=4.0)


@pytest.mark.op("ragged_scatter_add")
def test_scatter_add_gradient(backend, device):
    rows = torch.randn(5, 2, dtype=torch.float64, device=device, requires_grad=True)
    index = torch.tensor([0, 3, 0, 2, 3], device=device)
    assert torch.autograd.gradcheck(ops.ragged_scatter_add, (rows, index, 4))
    assert torch.autograd.gradgradcheck(ops.ragged_scatter_add, (rows, index, 4))


@pytest.mark.op("ragged_scatter_add")
@pytest.mark.parametrize(
    ("rows", "index", "num_rows", "message"),
    [
        (torch.zeros(3), CU, 4, r"rows must be a tensor \[T, D\]"),
        (torch.zeros(2, 2), CU, 4, "index must be of size 2"),
        (torch.zeros(3, 2), CU.float(), 4, "index must be of dtype"),
        (torch.zeros(3, 2), CU, 3, r"index must be in \[0, 3\) \(rows of the table\), got 3"),
        (torch.zeros(3, 2), CU, -1, "num_rows must be an integer of at least 0"),
    ],
)
def test_scatter_add_bad_input(backend, device, value_checks, rows, index, num_rows, message):
    with pytest.raises(ValueError, match=f"ragged_scatter_add: {message}"):
        ops.ragged_scatter_add(rows.to(device), index.to(device), num_rows)


# ---- no synchronisation


def test_reference_reads_no_value_back():
    """Fake tensors have no values: whatever would read one, or has a size that depends on one, raises."""
    with FakeTensorMode():
        cu_seqlens = torch.tensor([0, 2, 5])
        tables, index = [torch.randn(9, 3), torch.randn(5, 3)], torch.tensor([1, 2, 3, 4, 5])
        assert reference.ragged_pack(torch.randn(2, 4, 3), cu_seqlens, 5, True).shape == (5, 3)
        assert reference.ragged_unpack(torch.randn(5, 3), cu_seqlens, 4, 0.0, True).shape == (2, 4, 3)
        values, _, position_ids = reference.ragged_gather(tables, [index, None], [cu_seqlens, cu_seqlens], True)
        assert values.shape == (10, 3) and position_ids.shape == (10,)
        assert reference.ragged_scatter_add(torch.randn(5, 3), index, 9).shape == (9, 3)
