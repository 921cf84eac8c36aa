"""`ragged_gather` and its backward over every backend present."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.ragged_cases import (
    ALL_INDEXED,
    CU,
    MIXED,
    RAGGED,
    build_sources,
    gathered_by_loop,
    move,
    offsets,
    random_rows,
    sources,
)
from tests.ops.tolerances import assert_close
from ztok_fast import ops
from ztok_fast.ops.backends import ANY_DTYPE
from ztok_fast.ops.ragged.ragged_gather import RAGGED_GATHER_BACKWARD


@pytest.mark.op("ragged_gather")
@RAGGED
@given(spec=sources(), dtype=st.sampled_from(ANY_DTYPE), index_dtype=st.sampled_from([torch.int32, torch.int64]))
def test_gather_equals_loop(backend, device, spec, dtype, index_dtype):
    tables, indices, lengths = build_sources(spec, dtype, device, index_dtype)
    batch = ops.ragged_gather(tables, indices, [offsets(n, index_dtype, device) for n in lengths])
    expected, _ = gathered_by_loop(tables, indices, lengths)
    total_lengths = [sum(column) for column in zip(*lengths)]
    assert torch.equal(batch.values, expected)
    assert torch.equal(batch.cu_seqlens, offsets(total_lengths, index_dtype, device))
    assert batch.position_ids.tolist() == [t for length in total_lengths for t in range(length)]
    assert batch.position_ids.dtype == torch.int64


@pytest.mark.op("ragged_gather")
@pytest.mark.parametrize("num_sources", [1, 8, 9, 20])
def test_gather_from_many_sources(backend, device, num_sources):
    """One CUDA launch takes 8 sources; offsets and indices of both dtypes in one call."""
    spec = [([i % 3, (i + 1) % 3, i % 2], i % 3 != 1) for i in range(num_sources)]
    tables, indices, lengths = build_sources(spec, device=device)
    dtypes = [torch.int32 if i % 2 else torch.int64 for i in range(num_sources)]
    indices = [None if index is None else index.to(dtype) for index, dtype in zip(indices, reversed(dtypes))]
    tables = [table.requires_grad_() for table in tables]
    cu_seqlens = [offsets(n, dtype, device) for n, dtype in zip(lengths, dtypes)]
    batch = ops.ragged_gather(tables, indices, cu_seqlens)
    expected, origins = gathered_by_loop(tables, indices, lengths)
    assert torch.equal(batch.values, expected) and batch.cu_seqlens.dtype == torch.int64
    layout = ops.ragged_layout(cu_seqlens, [sum(n) for n in lengths])
    for row, (source, k) in enumerate(origins):
        assert layout.destinations[source][k] == row
    weights = torch.randn_like(expected)
    (batch.values * weights).sum().backward()
    for i, table in enumerate(tables):
        wanted = torch.zeros_like(table)
        for row, (source, k) in enumerate(origins):
            if source == i:
                wanted[k if indices[i] is None else indices[i][k]] += weights[row]
        torch.testing.assert_close(table.grad, wanted)


@pytest.mark.op("ragged_gather")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1, 5, 16])
def test_gather_from_misaligned_and_strided_tables(backend, device, dtype, width):
    storage = random_rows((400,), dtype, device)
    tables = [storage[1 : 1 + 4 * width].view(4, width), random_rows((5, 2 * width), dtype, device)[:, :width]]
    tables.append(random_rows((width, 6), dtype, device).T)
    indices = [torch.tensor([3, 0, 3, 1], device=device), None, torch.tensor([5, 9, 0, 9, 2, 9], device=device)[::2]]
    lengths = [[1, 0, 3], [2, 3, 0], [0, 1, 2]]
    values = ops.ragged_gather(tables, indices, [offsets(n, device=device) for n in lengths]).values
    assert torch.equal(values, gathered_by_loop(tables, indices, lengths)[0])


@pytest.mark.op("ragged_gather")
def test_gather_of_no_columns_still_lays_out(backend, device):
    batch = ops.ragged_gather([torch.zeros(3, 0, device=device)], [None], [offsets([1, 2], device=device)])
    assert batch.values.shape == (3, 0) and batch.position_ids.tolist() == [0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 1, 3]


@pytest.mark.op("ragged_gather")
@pytest.mark.parametrize("spec", [MIXED, ALL_INDEXED], ids=["mixed", "all-indexed"])
def test_gather_gradient(backend, device, spec):
    tables, indices, lengths = build_sources(spec, torch.float64, device)
    tables = [table.requires_grad_() for table in tables]
    cu_seqlens = [offsets(n, device=device) for n in lengths]

    def values(*tables):
        return ops.ragged_gather(tables, indices, cu_seqlens).values

    assert torch.autograd.gradcheck(values, tables)
    assert torch.autograd.gradgradcheck(values, tables)


@pytest.mark.op("ragged_gather")
def test_gather_gradient_of_one_table_given_twice(backend, device):
    table = torch.randn(3, 2, device=device, requires_grad=True)
    index = torch.tensor([0, 2, 0], device=device)
    cu_seqlens = offsets([2, 1], device=device)
    ops.ragged_gather([table, table], [index, None], [cu_seqlens, cu_seqlens]).values.sum().backward()
    assert table.grad[:, 0].tolist() == [3, 1, 2]


@pytest.mark.op("ragged_gather")
def test_gather_leaves_frozen_tables_alone(backend, device):
    frozen, trained = torch.randn(4, 2, device=device), torch.randn(3, 2, device=device, requires_grad=True)
    index = torch.tensor([3, 1], device=device)
    cu_seqlens = [offsets([1, 1], device=device), offsets([0, 3], device=device)]
    ops.ragged_gather([frozen, trained], [index, None], cu_seqlens).values.sum().backward()
    assert frozen.grad is None
    assert torch.equal(trained.grad, torch.ones_like(trained))


WIDE, NARROW = torch.zeros(5, 2), torch.zeros(3, 2)
GATHER = {"tables": [WIDE, NARROW], "indices": [torch.tensor([4, 0, 1]), None], "cu_seqlens": [CU, CU]}


@pytest.mark.op("ragged_gather")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": []}, "tables must be a list of at least one tensor"),
        ({"tables": [WIDE, torch.zeros(3)]}, r"tables\[1\] must be a tensor \[R_1, D\]"),
        ({"tables": [WIDE, torch.zeros(3, 3)]}, r"tables\[1\] must be of size 2 in dimension 1"),
        ({"tables": [WIDE, NARROW.double()]}, r"tables\[1\] must be of the dtype of tables\[0\]"),
        ({"tables": [WIDE, torch.zeros(4, 2)]}, r"cu_seqlens\[1\] must be 4 in its last element"),
        ({"indices": [None]}, "indices must be a list of 2 tensors"),
        ({"indices": [torch.tensor([0.0, 1, 2]), None]}, r"indices\[0\] must be of dtype int32, int64"),
        ({"indices": [torch.tensor([0, 5, 2]), None]}, r"indices\[0\] must be in \[0, 5\) .*got 5"),
        ({"indices": [torch.tensor([0, -1, 2]), None]}, r"indices\[0\] must be in \[0, 5\) .*got -1"),
        ({"cu_seqlens": CU}, "cu_seqlens must be a list of 2 tensors"),
        ({"cu_seqlens": [CU, torch.tensor([0, 3])]}, r"cu_seqlens\[1\] must be of size 3 in dimension 0"),
        ({"cu_seqlens": [CU, torch.tensor([0, 4, 3])]}, r"cu_seqlens\[1\] must be non-decreasing"),
    ],
)
def test_gather_bad_input(backend, device, value_checks, change, message):
    arguments = {name: move(value, device) for name, value in {**GATHER, **change}.items()}
    with pytest.raises(ValueError, match=f"ragged_gather: {message}"):
        ops.ragged_gather(**arguments)


@pytest.mark.op("ragged_gather_backward")
@pytest.mark.parametrize("spec", [MIXED, ALL_INDEXED, [([], True)]], ids=["mixed", "all-indexed", "no-sequence"])
def test_backward_opcheck(backend, device, spec):
    tables, indices, lengths = build_sources(spec, device=device)
    cu_seqlens = [offsets(n, device=device) for n in lengths]
    grad = torch.randn(sum(map(sum, lengths)), 3, device=device)
    needed = [i % 3 != 1 for i in range(len(spec))]
    arguments = (grad, indices, cu_seqlens, [len(table) for table in tables], needed)
    torch.library.opcheck(torch.ops.ztok.ragged_gather_backward.default, arguments)
    torch.library.opcheck(torch.ops.ztok.ragged_gather_backward.backend, (*arguments, backend))


@pytest.mark.op("ragged_gather_backward")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [3, 8, 130])
def test_backward_sums_often_used_rows(backend, device, dtype, width):
    """A separator in every sequence: one row of the table gets most of the gradient."""
    lengths = [[1] * 400, [i % 4 for i in range(400)]]
    indices = [torch.full((400,), 2, device=device), torch.randint(0, 50, (sum(lengths[1]),), device=device)]
    cu_seqlens = [offsets(n, device=device) for n in lengths]
    grad = torch.randn(sum(map(sum, lengths)), width, device=device).to(dtype)
    layout = ops.ragged_layout(cu_seqlens, [len(index) for index in indices])
    arguments = (grad, indices, cu_seqlens, [4, 60], [True, True])
    found = RAGGED_GATHER_BACKWARD(*arguments)
    for i, rows in enumerate((4, 60)):
        exact = torch.zeros(rows, width, dtype=torch.float64, device=device)
        exact.index_add_(0, indices[i], grad[layout.destinations[i]].double())
        assert_close(found[i], exact, scale=4.0)
    assert all(torch.equal(a, b) for a, b in zip(found, RAGGED_GATHER_BACKWARD(*arguments)))
