"""`ragged_pack` and `ragged_unpack` over every backend present."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.ragged_cases import CU, LENGTHS, RAGGED, offsets, packed_by_loop, random_rows, unpacked_by_loop
from ztok_fast import ops
from ztok_fast.ops.backends import ANY_DTYPE

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
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("start", [0, 1, 2, 5])
@pytest.mark.parametrize("width", [1, 16, 31, 64])
def test_pack_and_unpack_of_misaligned_rows(backend, device, dtype, start, width):
    """Rows that begin `start` elements into their storage, at any alignment that the dtype allows."""
    lengths, cu_seqlens = [4, 0, 2], offsets([4, 0, 2], device=device)
    storage = random_rows((3 * 5 * width + 8,), dtype, device)
    padded = storage[start : start + 3 * 5 * width].view(3, 5, width)
    packed = ops.ragged_pack(padded, cu_seqlens, 6)
    assert torch.equal(packed, packed_by_loop(padded, lengths))
    rows = storage[start : start + 6 * width].view(6, width)
    assert torch.equal(ops.ragged_unpack(rows, cu_seqlens, 5), unpacked_by_loop(rows, lengths, 5, 0))


@pytest.mark.op("ragged_pack")
def test_pack_gradient(backend, device):
    cu_seqlens = offsets([2, 0, 3, 1], device=device)
    padded = torch.randn(4, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(ops.ragged_pack, (padded, cu_seqlens, 6))
    assert torch.autograd.gradgradcheck(ops.ragged_pack, (padded, cu_seqlens, 6))
    ops.ragged_pack(padded, cu_seqlens, 6).sum().backward()
    assert torch.equal(padded.grad.sum((1, 2)), torch.tensor([4.0, 0, 6, 2], dtype=torch.float64, device=device))


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


# more offsets than the checks go through one by one
MANY = {"padded": torch.zeros(99, 3), "total": 98}
PACK = {"padded": torch.zeros(2, 3, 4), "cu_seqlens": torch.tensor([0, 1, 4]), "total": 4}


@pytest.mark.op("ragged_pack")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padded": torch.zeros(2)}, r"padded must be a tensor \[B, S, \*\], got float32 \[2\]"),
        ({"padded": None}, "padded must be a tensor"),
        (
            {"padded": torch.zeros(2, 3, dtype=torch.complex64)},
            "padded must be of dtype float16, .* bool, got complex64",
        ),
        ({"padded": torch.zeros(3, 3)}, "cu_seqlens must be of size 4"),
        ({"cu_seqlens": torch.tensor([0.0, 1.0, 4.0])}, "cu_seqlens must be of dtype int32, int64"),
        ({"cu_seqlens": torch.tensor([[0, 1, 4]])}, r"cu_seqlens must be a tensor \[B \+ 1\]"),
        ({"cu_seqlens": torch.tensor([1, 2, 4])}, "cu_seqlens must be 0 in its first element, got 1"),
        ({"cu_seqlens": torch.tensor([0, 3, 2]), "total": 2}, "cu_seqlens must be non-decreasing"),
        ({"cu_seqlens": torch.tensor([0, 4, 5]), "total": 5}, "cu_seqlens must be of sequences of at most 3 rows"),
        ({"total": 5}, "cu_seqlens must be 5 in its last element"),
        (MANY | {"cu_seqlens": torch.arange(100)}, "cu_seqlens must be 98 in its last element"),
        (MANY | {"cu_seqlens": torch.arange(1, 101)}, "cu_seqlens must be 0 in its first element"),
        (
            MANY | {"cu_seqlens": torch.tensor([0, *range(50), *range(49)])},
            r"cu_seqlens must be non-decreasing, got 49 followed by 0 at index 51",
        ),
        (
            MANY | {"cu_seqlens": torch.tensor([0] * 99 + [98])},
            r"cu_seqlens must be of sequences of at most 3 rows \(dimension 1 of padded\), got one of 98",
        ),
        ({"total": -1}, "total must be an integer of at least 0"),
        ({"total": 4.0}, "total must be an integer of at least 0"),
    ],
)
def test_pack_bad_input(backend, device, value_checks, change, message):
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
@pytest.mark.parametrize(
    "view",
    [lambda x: x[2:9], lambda x: x[::2, :, :3], lambda x: x.transpose(0, 1)[:7], lambda x: x[:1].expand(7, -1, -1)],
    ids=["sliced", "strided-rows", "transposed", "expanded"],
)
def test_unpack_of_a_view(backend, device, view):
    packed = view(torch.randn(14, 14, 6, device=device))
    lengths = [3, 0, 4]
    padded = ops.ragged_unpack(packed, offsets(lengths, device=device), 5, 2.0)
    assert torch.equal(padded, unpacked_by_loop(packed, lengths, 5, 2.0))


@pytest.mark.op("ragged_unpack")
@pytest.mark.parametrize("lengths", [[3000], [0, 3000, 0], [1] * 500 + [700] + [0] * 80])
@pytest.mark.parametrize("width", [1, 72])
def test_one_long_sequence_among_short_ones(backend, device, lengths, width):
    """More than one task of the CPU and more than one tile of a GPU; offsets too many for the list of the checks."""
    packed = random_rows((sum(lengths), width), torch.float32, device)
    cu_seqlens = offsets(lengths, torch.int32, device)
    padded = ops.ragged_unpack(packed, cu_seqlens, max(lengths), float("nan"))
    for b in range(len(lengths)):
        start, end = int(cu_seqlens[b]), int(cu_seqlens[b + 1])
        assert torch.equal(padded[b, : end - start], packed[start:end]) and padded[b, end - start :].isnan().all()
    assert torch.equal(ops.ragged_pack(padded, cu_seqlens, sum(lengths)), packed)


@pytest.mark.op("ragged_unpack")
def test_unpack_gradient(backend, device):
    cu_seqlens = offsets([2, 0, 3, 1], device=device)
    packed = torch.randn(6, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(ops.ragged_unpack, (packed, cu_seqlens, 4, 7.0))
    assert torch.autograd.gradgradcheck(ops.ragged_unpack, (packed, cu_seqlens, 4, 7.0))


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
def test_unpack_bad_input(backend, device, value_checks, change, message):
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in {**UNPACK, **change}.items()}
    with pytest.raises(ValueError, match=f"ragged_unpack: {message}"):
        ops.ragged_unpack(**arguments)
