"""Ragged ops with room for more rows than there are, run over every backend present; and in CUDA graphs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.ragged_cases import (
    LENGTHS,
    RAGGED,
    build_sources,
    gathered_by_loop,
    offsets,
    packed_by_loop,
    random_rows,
    sources,
    unpacked_by_loop,
)
from ztok_fast import ops
from ztok_fast.ops.backends import ANY_DTYPE

SLACK = st.integers(0, 4)


@pytest.mark.op("ragged_pack")
@RAGGED
@given(
    lengths=LENGTHS,
    slack=SLACK,
    trailing=st.sampled_from([(), (3,), (2, 3), (0,)]),
    dtype=st.sampled_from(ANY_DTYPE),
)
def test_pack_up_to_a_capacity(backend, device, lengths, slack, trailing, dtype):
    padded = random_rows((len(lengths), max(lengths, default=0) + 1, *trailing), dtype, device)
    packed = ops.ragged_pack(padded, offsets(lengths, device=device), sum(lengths) + slack, exact=False)
    assert torch.equal(packed[: sum(lengths)], packed_by_loop(padded, lengths))
    assert packed.shape[0] == sum(lengths) + slack and not packed[sum(lengths) :].any()


@pytest.mark.op("ragged_unpack")
@RAGGED
@given(lengths=LENGTHS, slack=SLACK, trailing=st.sampled_from([(), (3,)]), dtype=st.sampled_from(ANY_DTYPE))
def test_unpack_ignores_rows_past_the_last_sequence(backend, device, lengths, slack, trailing, dtype):
    packed = random_rows((sum(lengths) + slack, *trailing), dtype, device)
    padded = ops.ragged_unpack(packed, offsets(lengths, device=device), max(lengths, default=0) + 1, 1, exact=False)
    assert torch.equal(padded, unpacked_by_loop(packed, lengths, max(lengths, default=0) + 1, 1))


def with_slack(tables, indices, slack, device):
    """Every source with some rows in no sequence; their indices point nowhere."""
    for i, extra in enumerate(slack[: len(tables)]):
        if indices[i] is None:
            tables[i] = torch.cat([tables[i], random_rows((extra, 3), tables[i].dtype, device)])
        else:
            stale = torch.full((extra,), 10**6, dtype=indices[i].dtype, device=device)
            indices[i] = torch.cat([indices[i], stale])
    return tables, indices


@pytest.mark.op("ragged_gather")
@RAGGED
@given(
    spec=sources(),
    slack=st.lists(SLACK, min_size=4, max_size=4),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_gather_up_to_a_capacity(backend, device, spec, slack, index_dtype):
    tables, indices, lengths = build_sources(spec, torch.float32, device, index_dtype)
    expected, _ = gathered_by_loop(tables, indices, lengths)
    tables, indices = with_slack(tables, indices, slack, device)
    batch = ops.ragged_gather(tables, indices, [offsets(n, index_dtype, device) for n in lengths], exact=False)
    total_lengths = [sum(column) for column in zip(*lengths)]
    assert torch.equal(batch.values[: len(expected)], expected) and not batch.values[len(expected) :].any()
    assert torch.equal(batch.cu_seqlens, offsets(total_lengths, index_dtype, device))
    assert len(batch.values) == len(batch.position_ids) == len(expected) + sum(slack[: len(tables)])
    assert batch.position_ids[: len(expected)].tolist() == [t for length in total_lengths for t in range(length)]
    assert not batch.position_ids[len(expected) :].any()


@pytest.mark.op("ragged_layout")
@RAGGED
@given(spec=sources(), slack=st.lists(SLACK, min_size=4, max_size=4))
def test_layout_up_to_a_capacity(backend, device, spec, slack):
    lengths = [source_lengths for source_lengths, _ in spec]
    used = [sum(n) for n in lengths]
    totals = [total + extra for total, extra in zip(used, slack)]
    cu_seqlens = [offsets(n, device=device) for n in lengths]
    layout = ops.ragged_layout(cu_seqlens, totals, exact=False)
    exact = ops.ragged_layout(cu_seqlens, used)
    assert torch.equal(layout.cu_seqlens, exact.cu_seqlens)
    assert torch.equal(layout.position_ids[: sum(used)], exact.position_ids)
    assert not layout.position_ids[sum(used) :].any()
    for found, expected in zip(layout.destinations, exact.destinations):
        assert torch.equal(found[: len(expected)], expected)
    tail = [row for found, total in zip(layout.destinations, used) for row in found[total:].tolist()]
    assert tail == list(range(sum(used), sum(totals)))


@pytest.mark.op("ragged_gather")
def test_gradients_of_rows_past_the_last_sequence_are_zero(backend, device):
    cu_seqlens = [offsets([1, 0, 2], device=device), offsets([0, 2, 1], device=device)]
    tables = [torch.randn(n, 3, dtype=torch.float64, device=device, requires_grad=True) for n in (4, 5)]
    indices = [torch.tensor([3, 0, 3, 99], device=device), None]

    def values(*tables):
        return ops.ragged_gather(tables, indices, cu_seqlens, exact=False).values

    assert torch.autograd.gradcheck(values, tables)
    assert torch.autograd.gradgradcheck(values, tables)
    values(*tables).sum().backward()
    assert tables[0].grad[:, 0].tolist() == [1, 0, 0, 2] and tables[1].grad[:, 0].tolist() == [1, 1, 1, 0, 0]


@pytest.mark.op("ragged_pack")
def test_pack_gradient_up_to_a_capacity(backend, device):
    cu_seqlens = offsets([2, 0, 1], device=device)
    padded = torch.randn(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(ops.ragged_pack, (padded, cu_seqlens, 5, False))


@pytest.mark.op("ragged_unpack")
def test_unpack_gradient_up_to_a_capacity(backend, device):
    cu_seqlens = offsets([2, 0, 1], device=device)
    packed = torch.randn(5, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(ops.ragged_unpack, (packed, cu_seqlens, 4, 7.0, False))


# ---- capacity exceeded: an error wherever values are checked


@pytest.mark.op("ragged_pack")
def test_pack_capacity_exceeded(backend, device, value_checks):
    with pytest.raises(ValueError, match=r"ragged_pack: cu_seqlens must be at most 4 in its last element .*, got 5"):
        ops.ragged_pack(torch.zeros(2, 3, device=device), offsets([3, 2], device=device), 4, exact=False)


@pytest.mark.op("ragged_unpack")
def test_unpack_capacity_exceeded(backend, device, value_checks):
    with pytest.raises(ValueError, match=r"ragged_unpack: cu_seqlens must be at most 4 in its last element .*, got 5"):
        ops.ragged_unpack(torch.zeros(4, device=device), offsets([3, 2], device=device), 3, exact=False)


@pytest.mark.op("ragged_gather")
@pytest.mark.parametrize("index", [None, [0, 1, 0, 1]])
def test_gather_capacity_exceeded(backend, device, value_checks, index):
    index = None if index is None else torch.tensor(index, device=device)
    table, cu_seqlens = torch.zeros(4, 2, device=device), offsets([3, 2], device=device)
    with pytest.raises(ValueError, match=r"ragged_gather: cu_seqlens\[0\] must be at most 4 in its last .*, got 5"):
        ops.ragged_gather([table], [index], [cu_seqlens], exact=False)


@pytest.mark.op("ragged_gather")
def test_gather_checks_the_indices_that_are_used(backend, device, value_checks):
    table, cu_seqlens = torch.zeros(4, 2, device=device), offsets([1, 1], device=device)
    with pytest.raises(ValueError, match=r"ragged_gather: indices\[0\] must be in \[0, 4\) .*got 7"):
        ops.ragged_gather([table], [torch.tensor([0, 7, 9], device=device)], [cu_seqlens], exact=False)


@pytest.mark.op("ragged_layout")
def test_layout_capacity_exceeded(backend, device, value_checks):
    with pytest.raises(ValueError, match=r"ragged_layout: cu_seqlens\[0\] must be at most 4 in its last .*, got 5"):
        ops.ragged_layout([offsets([3, 2], device=device)], [4], exact=False)


# ---- CUDA graphs


def captured(function):
    """Run once on a side stream, capture, and return the graph with what it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def only_cuda(device):
    if device != "cuda":
        pytest.skip("CUDA graphs need a CUDA device")


@pytest.mark.gpu
@pytest.mark.op("ragged_pack")
def test_pack_in_a_graph(backend, device):
    only_cuda(device)
    padded = torch.randn(3, 8, 16, device=device, requires_grad=True)
    cu_seqlens = offsets([8, 0, 2], device=device)

    def step():
        packed = ops.ragged_pack(padded, cu_seqlens, 20, exact=False)
        return packed, *torch.autograd.grad(packed.square().sum(), padded)

    graph, (packed, grad) = captured(step)
    for lengths in ([1, 2, 3], [8, 4, 8], [0, 0, 0]):
        cu_seqlens.copy_(offsets(lengths, device=device))
        graph.replay()
        expected = ops.ragged_pack(padded, cu_seqlens, 20, exact=False)
        assert torch.equal(packed, expected)
        assert torch.equal(grad, 2 * ops.ragged_unpack(expected, cu_seqlens, 8, exact=False))


@pytest.mark.gpu
@pytest.mark.op("ragged_gather")
def test_gather_in_a_graph(backend, device):
    only_cuda(device)
    table = torch.randn(9, 16, device=device, requires_grad=True)
    hidden = torch.randn(7, 16, device=device, requires_grad=True)
    index = torch.randint(0, 9, (12,), device=device)
    cu_seqlens = [offsets([4, 0, 5], device=device), offsets([1, 2, 3], device=device)]

    def step():
        batch = ops.ragged_gather([table, hidden], [index, None], cu_seqlens, exact=False)
        return *batch, *torch.autograd.grad(batch.values.square().sum(), (table, hidden))

    graph, results = captured(step)
    for first, second in (([1, 1, 1], [0, 0, 0]), ([12, 0, 0], [0, 7, 0]), ([0, 2, 3], [3, 2, 1])):
        for cu, lengths in zip(cu_seqlens, (first, second)):
            cu.copy_(offsets(lengths, device=device))
        index.copy_(torch.randint(0, 9, (12,), device=device))
        graph.replay()
        for found, expected in zip(results, step()):
            assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.op("ragged_scatter_add")
def test_scatter_add_in_a_graph(backend, device):
    only_cuda(device)
    rows, index = torch.randn(300, 24, device=device), torch.zeros(300, dtype=torch.int64, device=device)
    graph, sums = captured(lambda: ops.ragged_scatter_add(rows, index, 5))
    for _ in range(3):
        index.copy_(torch.randint(0, 5, (300,), device=device))
        graph.replay()
        assert torch.equal(sums, ops.ragged_scatter_add(rows, index, 5))
