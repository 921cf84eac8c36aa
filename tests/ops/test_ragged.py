"""Contract of the ragged-batch ops, run over every backend present."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.tolerances import assert_close
from ztok_fast import ops
from ztok_fast.ops.ragged import reference
from ztok_fast.ops.requirements import ANY_DTYPE

CU = torch.tensor([0, 1, 3])
LENGTHS = st.lists(st.integers(0, 6), max_size=6)
RAGGED = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def offsets(lengths, dtype=torch.int64, device="cpu"):
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(device, dtype)


def random_rows(shape, dtype=torch.float32, device="cpu"):
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, device=device).to(dtype)


def packed_by_loop(padded, lengths):
    rows = [padded[b, t] for b, length in enumerate(lengths) for t in range(length)]
    return torch.stack(rows) if rows else padded.new_empty(0, *padded.shape[2:])


def unpacked_by_loop(packed, lengths, max_length, fill):
    padded = packed.new_full((len(lengths), max_length, *packed.shape[1:]), fill)
    row = 0
    for b, length in enumerate(lengths):
        for t in range(length):
            padded[b, t] = packed[row]
            row += 1
    return padded


# ---- ragged_pack


@pytest.mark.op("ragged_pack")
@RAGGED
@given(
    lengths=LENGTHS,
    spare=st.integers(0, 3),
    trailing=st.sampled_from([(), (3,), (2, 3), (0,)]),
    dtype=st.sampled_from(ANY_DTYPE),
    offset_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_pack_equals_loop(backend, device, lengths, spare, trailing, dtype, offset_dtype):
    max_length = max(lengths, default=0) + spare
    padded = random_rows((len(lengths), max_length, *trailing), dtype, device)
    packed = ops.ragged_pack(padded, offsets(lengths, offset_dtype, device), sum(lengths))
    assert packed.dtype == dtype and packed.is_contiguous()
    assert torch.equal(packed, packed_by_loop(padded, lengths))


@pytest.mark.op("ragged_pack")
@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, 1:6], lambda x: x.transpose(0, 1)[:, :5], lambda x: x[..., ::2], lambda x: x[:1].expand(7, -1, -1)],
    ids=["sliced", "transposed", "strided-rows", "expanded"],
)
def test_pack_of_a_view(backend, device, view):
    padded = view(torch.randn(7, 7, 6, device=device))
    lengths = [3, 0, 5, 1, 5, 2, 4][: padded.shape[0]]
    assert torch.equal(
        ops.ragged_pack(padded, offsets(lengths, device=device), sum(lengths)), packed_by_loop(padded, lengths)
    )


@pytest.mark.op("ragged_pack")
def test_pack_gradient(backend, device):
    cu_seqlens = offsets([2, 0, 3, 1], device=device)
    padded = torch.randn(4, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(ops.ragged_pack, (padded, cu_seqlens, 6))
    assert torch.autograd.gradgradcheck(ops.ragged_pack, (padded, cu_seqlens, 6))
    ops.ragged_pack(padded, cu_seqlens, 6).sum().backward()
    assert torch.equal(padded.grad.sum((1, 2)), torch.tensor([4.0, 0, 6, 2], dtype=torch.float64, device=device))


@pytest.mark.op("ragged_pack")
@pytest.mark.parametrize("lengths", [[2, 0, 3], [0], []], ids=str)
def test_pack_opcheck(backend, device, lengths):
    padded = torch.randn(len(lengths), 3, 2, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.ztok.ragged_pack.default, (padded, offsets(lengths, device=device), sum(lengths)))


@pytest.mark.op("ragged_pack")
def test_pack_compiles_once_for_all_sizes(backend, device):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(ops.ragged_pack, fullgraph=True, dynamic=True, backend=count)
    for lengths in ([2, 3], [4, 5, 6], [7, 2, 0, 3]):
        padded = torch.randn(len(lengths), 7, 9, device=device)  # sizes that differ: equal ones would share a symbol
        assert torch.equal(
            compiled(padded, offsets(lengths, device=device), sum(lengths)), packed_by_loop(padded, lengths)
        )
    assert len(graphs) == 1


PACK = {"padded": torch.zeros(2, 3, 4), "cu_seqlens": torch.tensor([0, 1, 4]), "total": 4}


@pytest.mark.op("ragged_pack")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padded": torch.zeros(2)}, r"padded must be a tensor \[B, S, \*\], got float32 \[2\]"),
        ({"padded": None}, "padded must be a tensor"),
        ({"padded": torch.zeros(2, 3, dtype=torch.complex64)}, "padded must be of a real or bool dtype"),
        ({"padded": torch.zeros(3, 3)}, "cu_seqlens must be of size 4"),
        ({"cu_seqlens": torch.tensor([0.0, 1.0, 4.0])}, "cu_seqlens must be of dtype int32, int64"),
        ({"cu_seqlens": torch.tensor([[0, 1, 4]])}, r"cu_seqlens must be a tensor \[B \+ 1\]"),
        ({"cu_seqlens": torch.tensor([1, 2, 4])}, "cu_seqlens must be 0 in its first element, got 1"),
        ({"cu_seqlens": torch.tensor([0, 3, 2]), "total": 2}, "cu_seqlens must be non-decreasing"),
        ({"cu_seqlens": torch.tensor([0, 4, 5]), "total": 5}, "cu_seqlens must be of sequences of at most 3 rows"),
        ({"total": 5}, "cu_seqlens must be 5 in its last element"),
        ({"total": -1}, "total must be an integer of at least 0"),
        ({"total": 4.0}, "total must be an integer of at least 0"),
    ],
)
def test_pack_bad_input(backend, device, change, message):
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in {**PACK, **change}.items()}
    with pytest.raises(ValueError, match=f"ragged_pack: {message}"):
        ops.ragged_pack(**arguments)


# ---- ragged_unpack


@pytest.mark.op("ragged_unpack")
@RAGGED
@given(
    lengths=LENGTHS,
    spare=st.integers(0, 3),
    trailing=st.sampled_from([(), (3,), (2, 3), (0,)]),
    dtype=st.sampled_from(ANY_DTYPE),
    fill=st.sampled_from([0.0, 1.0]),
)
def test_unpack_equals_loop_and_packs_back(backend, device, lengths, spare, trailing, dtype, fill):
    max_length = max(lengths, default=0) + spare
    packed = random_rows((sum(lengths), *trailing), dtype, device)
    cu_seqlens = offsets(lengths, torch.int32, device)
    padded = ops.ragged_unpack(packed, cu_seqlens, max_length, fill)
    assert padded.dtype == dtype
    assert torch.equal(padded, unpacked_by_loop(packed, lengths, max_length, fill))
    assert torch.equal(ops.ragged_pack(padded, cu_seqlens, sum(lengths)), packed)


@pytest.mark.op("ragged_unpack")
@pytest.mark.parametrize(
    ("dtype", "fill"), [(torch.float32, float("-inf")), (torch.int64, -100), (torch.bool, True), (torch.int8, -128)]
)
def test_unpack_fill(backend, device, dtype, fill):
    packed = random_rows((3,), dtype, device)
    padded = ops.ragged_unpack(packed, offsets([1, 2], device=device), 3, fill)
    assert torch.equal(padded, unpacked_by_loop(packed, [1, 2], 3, fill))


@pytest.mark.op("ragged_unpack")
def test_unpack_gradient(backend, device):
    cu_seqlens = offsets([2, 0, 3, 1], device=device)
    packed = torch.randn(6, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(ops.ragged_unpack, (packed, cu_seqlens, 4, 7.0))
    assert torch.autograd.gradgradcheck(ops.ragged_unpack, (packed, cu_seqlens, 4, 7.0))


@pytest.mark.op("ragged_unpack")
@pytest.mark.parametrize("lengths", [[2, 0, 3], [0], []], ids=str)
def test_unpack_opcheck(backend, device, lengths):
    packed = torch.randn(sum(lengths), 2, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.ztok.ragged_unpack.default, (packed, offsets(lengths, device=device), 4, 0.5))


@pytest.mark.op("ragged_unpack")
def test_unpack_compiles_with_gradient(backend, device):
    cu_seqlens = offsets([2, 3], device=device)
    packed = torch.randn(5, 2, device=device, requires_grad=True)
    padded = torch.compile(ops.ragged_unpack, fullgraph=True, backend="aot_eager")(packed, cu_seqlens, 4)
    assert torch.equal(padded, unpacked_by_loop(packed.detach(), [2, 3], 4, 0.0))
    padded.square().sum().backward()
    assert torch.equal(packed.grad, 2 * packed.detach())


UNPACK = {"packed": torch.zeros(4, 2), "cu_seqlens": torch.tensor([0, 1, 4]), "max_length": 3, "fill": 0.0}


@pytest.mark.op("ragged_unpack")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.tensor(1.0)}, r"packed must be a tensor \[T, \*\]"),
        ({"packed": torch.zeros(5)}, "cu_seqlens must be 5 in its last element"),
        ({"cu_seqlens": CU[:0]}, r"cu_seqlens must be a tensor \[B \+ 1\] of at least one"),
        ({"cu_seqlens": torch.tensor([0, 3, 1, 4])}, "cu_seqlens must be non-decreasing"),
        ({"max_length": 2}, "cu_seqlens must be of sequences of at most 2 rows"),
        ({"max_length": -1}, "max_length must be an integer of at least 0"),
        ({"fill": "0"}, "fill must be a number"),
        ({"packed": torch.zeros(4, dtype=torch.int64), "fill": 0.5}, "fill must be a value of int64"),
        ({"packed": torch.zeros(4, dtype=torch.uint8), "fill": -1}, "fill must be a value of uint8"),
        ({"packed": torch.zeros(4, dtype=torch.int64), "fill": float("nan")}, "fill must be a value of int64"),
    ],
)
def test_unpack_bad_input(backend, device, change, message):
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in {**UNPACK, **change}.items()}
    with pytest.raises(ValueError, match=f"ragged_unpack: {message}"):
        ops.ragged_unpack(**arguments)


# ---- ragged_gather and ragged_layout


def gathered_by_loop(tables, indices, lengths):
    """Rows and (source, row of the source) of every output row, one at a time."""
    rows, origins = [], []
    for b in range(len(lengths[0])):
        for i, table in enumerate(tables):
            start = sum(lengths[i][:b])
            for k in range(start, start + lengths[i][b]):
                rows.append(table[k if indices[i] is None else int(indices[i][k])])
                origins.append((i, k))
    return torch.stack(rows) if rows else tables[0].new_empty(0, tables[0].shape[1]), origins


@st.composite
def sources(draw):
    """Lengths per source and whether each source is indexed."""
    num_sequences = draw(st.integers(0, 4))
    row = st.lists(st.integers(0, 4), min_size=num_sequences, max_size=num_sequences)
    return draw(st.lists(st.tuples(row, st.booleans()), min_size=1, max_size=4))


def build_sources(spec, dtype=torch.float32, device="cpu", index_dtype=torch.int64):
    tables, indices, lengths = [], [], []
    for source_lengths, indexed in spec:
        total = sum(source_lengths)
        num_rows = 5 if indexed else total
        tables.append(random_rows((num_rows, 3), dtype, device))
        indices.append(torch.randint(0, 5, (total,), device=device).to(index_dtype) if indexed else None)
        lengths.append(source_lengths)
    return tables, indices, lengths


MIXED = [([1, 2, 0], True), ([0, 0, 0], True), ([2, 0, 1], False), ([0, 3, 1], True)]
ALL_INDEXED = [([1, 2, 0], True), ([2, 0, 1], True)]


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


@pytest.mark.op("ragged_gather")
@pytest.mark.parametrize("spec", [MIXED, ALL_INDEXED, [([], True)]], ids=["mixed", "all-indexed", "no-sequence"])
def test_gather_opcheck(backend, device, spec):
    tables, indices, lengths = build_sources(spec, device=device)
    tables = [table.requires_grad_() for table in tables]
    cu_seqlens = [offsets(n, device=device) for n in lengths]
    torch.library.opcheck(torch.ops.ztok.ragged_gather.default, (tables, indices, cu_seqlens))


@pytest.mark.op("ragged_gather")
def test_gather_compiles_with_gradient(backend, device):
    tables, indices, lengths = build_sources(MIXED, device=device)
    cu_seqlens = [offsets(n, device=device) for n in lengths]
    eager, compiled = ([table.clone().requires_grad_() for table in tables] for _ in range(2))
    expected = ops.ragged_gather(eager, indices, cu_seqlens)
    actual = torch.compile(ops.ragged_gather, fullgraph=True, backend="aot_eager")(compiled, indices, cu_seqlens)
    for a, e in zip(actual, expected):
        assert torch.equal(a, e)
    for batch in (actual, expected):
        batch.values.square().sum().backward()
    for a, e in zip(compiled, eager):
        assert torch.equal(a.grad, e.grad)


WIDE, NARROW = torch.zeros(5, 2), torch.zeros(3, 2)
GATHER = {"tables": [WIDE, NARROW], "indices": [torch.tensor([4, 0, 1]), None], "cu_seqlens": [CU, CU]}


@pytest.mark.op("ragged_gather")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": []}, "tables must be a list of at least one tensor"),
        ({"tables": [WIDE, torch.zeros(3)]}, r"tables\[1\] must be a tensor \[R, D\]"),
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
def test_gather_bad_input(backend, device, change, message):
    def move(value):
        return value.to(device) if torch.is_tensor(value) else value

    arguments = {
        k: [move(item) for item in v] if isinstance(v, list) else move(v) for k, v in {**GATHER, **change}.items()
    }
    with pytest.raises(ValueError, match=f"ragged_gather: {message}"):
        ops.ragged_gather(**arguments)


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
def test_layout_opcheck_and_gradient_of_place(backend, device):
    cu_seqlens = [offsets([1, 0, 2], device=device), offsets([0, 2, 1], device=device)]
    torch.library.opcheck(torch.ops.ztok.ragged_layout.default, (cu_seqlens, [3, 3]))
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
def test_layout_bad_input(backend, device, cu_seqlens, totals, message):
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
def test_scatter_add_gradient_and_opcheck(backend, device):
    rows = torch.randn(5, 2, dtype=torch.float64, device=device, requires_grad=True)
    index = torch.tensor([0, 3, 0, 2, 3], device=device)
    assert torch.autograd.gradcheck(ops.ragged_scatter_add, (rows, index, 4))
    torch.library.opcheck(torch.ops.ztok.ragged_scatter_add.default, (rows, index, 4))


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
def test_scatter_add_bad_input(backend, device, rows, index, num_rows, message):
    with pytest.raises(ValueError, match=f"ragged_scatter_add: {message}"):
        ops.ragged_scatter_add(rows.to(device), index.to(device), num_rows)


# ---- no synchronisation


def test_reference_reads_no_value_back():
    """Fake tensors have no values: whatever would read one, or has a size that depends on one, raises."""
    with FakeTensorMode():
        cu_seqlens = torch.tensor([0, 2, 5])
        tables, index = [torch.randn(9, 3), torch.randn(5, 3)], torch.tensor([1, 2, 3, 4, 5])
        assert reference.ragged_pack(torch.randn(2, 4, 3), cu_seqlens, 5).shape == (5, 3)
        assert reference.ragged_unpack(torch.randn(5, 3), cu_seqlens, 4, 0.0).shape == (2, 4, 3)
        values, _, position_ids = reference.ragged_gather(tables, [index, None], [cu_seqlens, cu_seqlens])
        assert values.shape == (10, 3) and position_ids.shape == (10,)
        assert reference.ragged_scatter_add(torch.randn(5, 3), index, 9).shape == (9, 3)
