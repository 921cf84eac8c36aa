"""The compiled `ragged_pack` against a plain loop over sequences, on every device that is here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ztok_fast import native

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(not native.status("cpu").available, reason=f"cpu: {native.status('cpu').reason}"),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# element sizes 1, 2, 4, 8 and 16
DTYPES = [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.complex128]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("cuda: no CUDA device")
        if not native.status("cuda").available:
            pytest.skip(f"cuda: {native.status('cuda').reason}")
    return request.param


def offsets(lengths: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def pack_reference(padded: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch.cat([padded.new_empty((0, *padded.shape[2:])), *(padded[b, :n] for b, n in enumerate(lengths))])


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    values = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed))
    return values % 2 == 0 if dtype == torch.bool else values.to(dtype)


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left.cpu(), right.cpu())


def pack(padded: torch.Tensor, cu_seqlens: torch.Tensor, total: int, device: str) -> torch.Tensor:
    return torch.ops.ztok.ragged_pack(padded.to(device), cu_seqlens.to(device), total, True)


@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trailing", [(), (1,), (3,), (64,), (2, 5)], ids=str)
def test_every_dtype_and_row_width(device, dtype, offset_dtype, trailing):
    lengths = [3, 0, 1, 7, 0]
    padded = random_bytes((5, 7, *trailing), dtype)
    packed = pack(padded, offsets(lengths, offset_dtype), 11, device)
    assert same_bytes(packed, pack_reference(padded, lengths))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), max_size=8), extra=st.integers(0, 3), width=st.integers(0, 17))
@pytest.mark.skipif(not native.status("cpu").available, reason=f"cpu: {native.status('cpu').reason}")
def test_ragged_lengths(lengths, extra, width):
    padded = random_bytes((len(lengths), max(lengths, default=0) + extra, width), torch.float32)
    packed = pack(padded, offsets(lengths), sum(lengths), "cpu")
    assert same_bytes(packed, pack_reference(padded, lengths))


def test_rows_shared_between_threads(device):
    """Enough bytes for several tasks, with borders of tasks inside sequences and sequences inside tasks."""
    lengths = [500, 0, 1, 2, 3, 0, 400, 1]
    padded = random_bytes((8, 500, 130), torch.float32)
    assert same_bytes(pack(padded, offsets(lengths), 907, device), pack_reference(padded, lengths))


@pytest.mark.parametrize("start", range(9))
def test_misaligned_rows(device, start):
    """A view that begins `start` bytes into its storage, with rows and batches further apart than they are long."""
    lengths = [4, 2]
    storage = random_bytes((2, 5, 50), torch.uint8).to(device)
    padded = storage[:, :4, start : start + 33]
    packed = torch.ops.ztok.ragged_pack(padded, offsets(lengths).to(device), 6, True)
    assert same_bytes(packed, pack_reference(padded, lengths))


def test_strided_rows_expanded_batches_and_strided_offsets(device):
    lengths = [2, 3]
    transposed = random_bytes((2, 6, 4, 3), torch.float32).transpose(2, 3)
    every_other = offsets(lengths).repeat_interleave(2)[::2]
    assert same_bytes(pack(transposed, every_other, 5, device), pack_reference(transposed, lengths))
    expanded = random_bytes((1, 6, 4), torch.float32).expand(2, 6, 4)
    assert same_bytes(pack(expanded, offsets(lengths), 5, device), pack_reference(expanded, lengths))


@pytest.mark.parametrize("shape", [(0, 0), (0, 5, 3), (3, 0, 2), (2, 4, 0)], ids=str)
def test_nothing_to_pack(device, shape):
    packed = pack(torch.zeros(shape), torch.zeros(shape[0] + 1, dtype=torch.int32), 0, device)
    assert packed.shape == (0, *shape[2:])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_reads_only_valid_positions(device, dtype):
    lengths, width = [5, 0, 3], 24
    padded = random_bytes((3, 6, width), dtype)
    padded[0, 5:], padded[1], padded[2, 3:] = 77, 77, 77  # what lies beyond a length must not appear
    padded = torch.where(padded == 77, padded, padded % 50)
    packed = pack(padded, offsets(lengths), 8, device)
    assert same_bytes(packed, pack_reference(padded, lengths))
    assert not (packed == 77).any()


BAD_OFFSETS = {
    "first_not_zero": ([1, 3, 5], 5, r"cu_seqlens\[0\]: expected 0, got 1"),
    "decreasing": ([0, 4, 2], 2, "non-decreasing offsets, got 4 before 2 at sequence 1"),
    "longer_than_padded": ([0, 5, 6], 6, "at most S = 4, got 5 at sequence 0"),
    "total_too_small": ([0, 2, 4], 3, r"cu_seqlens\[-1\]: expected 3 \(the packed rows\), got 4"),
    "negative": ([0, -2, 2], 2, "non-decreasing offsets, got 0 before -2 at sequence 0"),
    "negative_total": ([0, 2, 4], -1, "total: expected the number of packed rows, at least 0, got -1"),
}


@pytest.mark.skipif(not native.status("cpu").available, reason=f"cpu: {native.status('cpu').reason}")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", BAD_OFFSETS)
def test_bad_offsets_are_refused_on_the_cpu(case, dtype):
    values, total, message = BAD_OFFSETS[case]
    with pytest.raises(RuntimeError, match=message):
        pack(torch.zeros(2, 4, 3), torch.tensor(values, dtype=dtype), total, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [name for name in BAD_OFFSETS if name != "negative_total"])
def test_bad_offsets_stay_inside_the_tensors_on_cuda(case):
    """Offsets are not read on the host there: uncovered rows are zero and nothing else is touched."""
    if not torch.cuda.is_available():
        pytest.skip("cuda: no CUDA device")
    if not native.status("cuda").available:
        pytest.skip(f"cuda: {native.status('cuda').reason}")
    values, total, _ = BAD_OFFSETS[case]
    packed = pack(torch.ones(2, 4, 3), torch.tensor(values), total, "cuda")
    assert ((packed == 0) | (packed == 1)).all()


@pytest.mark.skipif(not native.status("cpu").available, reason=f"cpu: {native.status('cpu').reason}")
@pytest.mark.parametrize(
    ("padded", "cu_seqlens", "message"),
    [
        (torch.zeros(4), torch.zeros(5, dtype=torch.int32), "padded: expected .* at least 2 dimensions, got 1"),
        (torch.zeros(2, 4), torch.zeros(3), "cu_seqlens: expected dtype int32 or int64, got Float"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32), "cu_seqlens: expected 3 offsets for a batch of 2"),
        (torch.zeros(2, 4), torch.zeros(1, 3, dtype=torch.int32), r"cu_seqlens: expected \[B \+ 1\], got 2 dimensions"),
    ],
    ids=["padded_rank", "offset_dtype", "offset_count", "offset_rank"],
)
def test_bad_shapes_and_dtypes_are_refused(padded, cu_seqlens, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ztok.ragged_pack(padded, cu_seqlens, 0, True)
