"""The bodies of the ragged CUDA kernels, compiled for the host and run thread by thread, against the reference.

What this cannot show is what only a GPU has: races, barriers, speed. Indices, alignment, bounds and sums are the same
code. Compiled with the undefined-behaviour sanitizer, which ends the process at a misaligned vector access.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.native.guard_pages import CANARY, SIDES, Guarded, guard
from ztok_fast.ops.ragged import reference

ROOT = Path(__file__).resolve().parents[2]
CXX = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler was found")
RAGGED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LENGTHS = st.lists(st.integers(0, 9), max_size=6)


class Source(ctypes.Structure):
    _fields_ = [
        ("table", ctypes.c_void_p),
        ("table_rows", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("index_wide", ctypes.c_int64),
        ("cu_seqlens", ctypes.c_void_p),
        ("cu_wide", ctypes.c_int64),
        ("total", ctypes.c_int64),
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp("ragged") / "ragged_on_host.so"
    includes = [ROOT / "csrc/cuda", ROOT / "csrc/common", Path(torch.__file__).parent / "include"]
    sanitize = ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    command = [CXX, "-O1", "-std=c++17", "-shared", "-fPIC", *sanitize, *(f"-I{folder}" for folder in includes)]
    source = ROOT / "tests/native/ragged_on_host.cpp"
    result = subprocess.run([*command, str(source), "-o", str(library)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = ctypes.CDLL(str(library))
    for name in ("address_in_padded", "address_in_packed", "destination_of", "origin_of"):
        getattr(loaded, name).restype = ctypes.c_int64
    loaded.host_fault.restype = ctypes.c_uint64
    return loaded


def call(kernels, name, *arguments):
    """Call a function of the library: tensors by address, integers in 64 bits.

    It is called three times: with every tensor ending at a guard page, with every one beginning at one, and with the
    tensors as they lie. What it returns, and leaves in the tensors, must be the same.
    """
    function = getattr(kernels, name)
    results = []
    for side in SIDES:
        guarded = [Guarded(value, side) if isinstance(value, torch.Tensor) else value for value in arguments]
        returned = function(*(in_c(value, side) for value in guarded))
        fault = kernels.host_fault()
        assert fault == 0, f"{name}: access out of bounds at {fault:#x}, tensors {side} at guard pages"
        tensors = [value for value in guarded if isinstance(value, Guarded)]
        assert all(t.intact() for t in tensors)
        results.append((returned, [t.tensor.clone() for t in tensors]))
    returned = function(*(in_c(value, None) for value in arguments))
    left = [value for value in arguments if isinstance(value, torch.Tensor)]
    for guarded_returned, guarded_left in results:
        assert guarded_returned == returned or function.restype is ctypes.c_int
        assert all(torch.equal(a, b) for a, b in zip(guarded_left, left))
    return returned


def in_c(value, side):
    if isinstance(value, Sources):
        return value.array(side)
    if isinstance(value, Guarded):
        value = value.tensor
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, (int, bool)) else value


def wide(indices):
    return indices.dtype == torch.int64


def offsets(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(dtype)


def widest_unit(*values):
    """The unit that csrc/cuda/launch.h chooses."""
    return next(unit for unit in (16, 8, 4, 2, 1) if all(value % unit == 0 for value in values))


def at(shape, dtype, start):
    """A contiguous tensor that begins `start` elements after a 64-byte boundary, between canaries; and its storage."""
    element = torch.empty((), dtype=dtype).element_size()
    size = torch.Size(shape).numel() * element
    storage = torch.full((size + 256,), CANARY, dtype=torch.uint8)
    first = -storage.data_ptr() % 64 + 64 + start * element
    return storage[first : first + size].view(dtype).reshape(shape), storage, first


def canaries_intact(storage, first, size):
    return bool((storage[:first] == CANARY).all() and (storage[first + size :] == CANARY).all())


def random_rows(shape, dtype, start=0):
    rows, _, _ = at(shape, dtype, start)
    return rows.copy_(torch.randint(-60, 60, shape))


@RAGGED
@given(
    lengths=LENGTHS,
    spare=st.integers(0, 2),
    slack=st.integers(0, 3),
    width=st.sampled_from([1, 2, 3, 8, 33, 64, 700]),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64]),
    start=st.integers(0, 3),
    offset_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_pack_and_unpack(kernels, lengths, spare, slack, width, dtype, start, offset_dtype):
    batch, max_length, total = len(lengths), max(lengths, default=0) + spare, sum(lengths) + slack
    cu_seqlens = offsets(lengths, offset_dtype)
    padded = random_rows((batch, max_length, width), dtype, start)
    packed, storage, first = at((total, width), dtype, start)
    row = width * padded.element_size()
    unit = widest_unit(padded.data_ptr(), packed.data_ptr(), row)
    strides = (max_length * row, row)
    call(
        kernels,
        "host_pack",
        padded,
        cu_seqlens,
        wide(cu_seqlens),
        batch,
        max_length,
        *strides,
        packed,
        total,
        row,
        unit,
    )
    assert torch.equal(packed, reference.ragged_pack(padded, cu_seqlens, total, False))
    assert canaries_intact(storage, first, total * row)

    padded, storage, first = at((batch, max_length, width), dtype, start)
    fill = torch.full((16 // padded.element_size(),), 5, dtype=dtype)
    if max_length:
        arguments = (packed, cu_seqlens, wide(cu_seqlens), total, row, padded, batch, max_length, row, fill, unit)
        call(kernels, "host_unpack", *arguments)
    assert torch.equal(padded, reference.ragged_unpack(packed, cu_seqlens, max_length, 5, False))
    assert canaries_intact(storage, first, batch * max_length * row)


@pytest.mark.parametrize("values", [[1, 3, 5], [0, 4, 2], [0, 9, 10], [0, -2, 2], [0, 2, 4000000000], [-5, -3, -1]])
def test_bad_offsets_stay_inside_the_tensors(kernels, values):
    """A GPU's offsets are not known when the kernel starts: the sanitizer and the canaries see any stray access."""
    cu_seqlens = torch.tensor(values)
    padded = random_rows((2, 4, 8), torch.float32)
    packed, storage, first = at((6, 8), torch.float32, 0)
    call(kernels, "host_pack", padded, cu_seqlens, True, 2, 4, 128, 32, packed, 6, 32, 16)
    assert canaries_intact(storage, first, packed.nbytes)
    known = torch.cat([padded.reshape(8, 8), torch.zeros(1, 8)])
    assert all((row == known).all(1).any() for row in packed)
    unpacked, storage, first = at((2, 4, 8), torch.float32, 0)
    call(kernels, "host_unpack", packed, cu_seqlens, True, 6, 32, unpacked, 2, 4, 32, torch.zeros(4), 16)
    assert canaries_intact(storage, first, unpacked.nbytes)
    indices = [None, torch.tensor([0, 99, -1, 5, 5, 0])]
    sources = Sources([packed, packed], indices, [cu_seqlens, offsets([3, 3])])
    merged, position_ids, destinations = layout(kernels, sources)
    assert ((destinations >= 0) & (destinations < 12)).all() and (position_ids >= 0).all()
    values, storage, first = at((12, 8), torch.float32, 0)
    call(kernels, "host_gather", sources, 2, 2, 12, 32, 16, values, position_ids)
    assert canaries_intact(storage, first, values.nbytes)


def test_no_row_outside_the_tensors_is_ever_addressed(kernels):
    """Reads leave no trace, so what bad offsets would read is asked of the locators: "filled", which is no address."""
    filled = -(1 << 40)
    for values in ([0, 9, 12], [0, -4, 2], [5, 9, 12], [0, 4, 1 << 40]):
        cu_seqlens = torch.tensor(values)
        for row in range(2 * 4):  # padded [2, 4] from packed [6]
            address = call(kernels, "address_in_packed", cu_seqlens, 6, 4, 16, row)
            assert address == filled or 0 <= address < 6 * 16
        for row in range(12):
            address = call(kernels, "address_in_padded", cu_seqlens, 2, 4, 64, 16, row)
            assert address == filled or 0 <= address < 2 * 4 * 16


class Sources:
    def __init__(self, tables, indices, cu_seqlens):
        self.tensors = (tables, indices, cu_seqlens)
        self.totals = [len(table if index is None else index) for table, index in zip(tables, indices)]
        self.total, self.batch, self.count = sum(self.totals), len(cu_seqlens[0]) - 1, len(tables)
        self.row = tables[0].shape[1] * tables[0].element_size()
        self.empty = torch.zeros(1, dtype=torch.int64)  # an address for an empty index: null means none

    def array(self, side):
        """The parameters in C, of copies at guard pages, which live until the next call; of the tensors for None."""
        self.held = [[t if t is None or side is None else guard(t, side) for t in tensors] for tensors in self.tensors]
        return (Source * self.count)(
            *(
                Source(
                    table.data_ptr(), len(table), self.row,
                    None if index is None else index.data_ptr() or self.empty.data_ptr(),
                    index is not None and wide(index), cu.data_ptr(), wide(cu), total,
                )
                for table, index, cu, total in zip(*self.held, self.totals)
            )
        )  # fmt: skip


def layout(kernels, sources):
    merged = torch.full((sources.batch + 1,), -1)
    position_ids, destinations = torch.full((2, sources.total), -1)
    arguments = (sources, sources.count, sources.batch, sources.total, merged, True, position_ids, destinations)
    call(kernels, "host_layout", *arguments)
    return merged, position_ids, destinations


@st.composite
def interleaved(draw, max_sources=20):
    """Lengths, slack and indexed or not, per source; more sources than one launch takes among them."""
    num_sequences = draw(st.integers(0, 4))
    lengths = st.lists(st.integers(0, 4), min_size=num_sequences, max_size=num_sequences)
    source = st.tuples(lengths, st.integers(0, 2), st.booleans())
    return draw(st.lists(source, min_size=1, max_size=max_sources))


@RAGGED
@given(
    spec=interleaved(),
    width=st.sampled_from([1, 3, 8]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64, torch.float16]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    narrow=st.booleans(),
)
def test_gather_layout_and_backward(kernels, spec, width, dtype, index_dtype, narrow):
    tables, indices, cu_seqlens = [], [], []
    for lengths, slack, indexed in spec:
        total = sum(lengths) + slack
        tables.append(random_rows((5 if indexed else total, width), dtype))
        index = torch.randint(0, 5, (total,))
        index[sum(lengths) :] = 12345  # of slack: must not be used
        indices.append(index.to(index_dtype) if indexed else None)
        cu_seqlens.append(offsets(lengths, index_dtype))
    sources = Sources(tables, indices, cu_seqlens)
    row = width * tables[0].element_size()
    expected, merged, positions = reference.ragged_gather(tables, indices, cu_seqlens, False)
    for found, wanted in zip(layout(kernels, sources), reference.ragged_layout(cu_seqlens, sources.totals, False)):
        assert torch.equal(found, wanted.long())

    values, storage, first = at((sources.total, width), dtype, 0)
    if sources.count > 8:
        values.zero_()  # as the library does before several launches
    position_ids = torch.full((sources.total,), -1)
    unit = widest_unit(values.data_ptr(), row)
    shape = (sources.count, sources.batch, sources.total)
    call(kernels, "host_gather", sources, *shape, row, unit, values, position_ids)
    assert torch.equal(values, expected) and torch.equal(position_ids, positions)
    assert canaries_intact(storage, first, sources.total * row)

    grad = torch.randn(sources.total, width).to(dtype)
    table_rows = [len(table) for table in tables]
    wanted = reference.ragged_gather_backward(grad, indices, cu_seqlens, table_rows, [True] * sources.count)
    for i, index in enumerate(indices):
        found, storage, first = at((table_rows[i], width), dtype, 0)
        if index is None:
            unit = widest_unit(found.data_ptr(), grad.data_ptr(), row)
            arguments = (sources.count, sources.batch, i, grad, sources.total, row, row, unit, found)
            call(kernels, "host_return_rows", sources, *arguments)
        else:
            found.zero_()
            arguments = (sources, sources.count, sources.batch, i, index, wide(index), len(index))
            call_sum(kernels, narrow, arguments, grad, found)
        assert torch.equal(found, wanted[i])
        assert canaries_intact(storage, first, table_rows[i] * row)


def call_sum(kernels, narrow, pairs, rows, out):
    kind = [torch.float32, torch.float64, torch.float16, torch.bfloat16].index(rows.dtype)
    vectors = widest_unit(rows.data_ptr(), out.data_ptr(), rows.shape[1] * rows.element_size()) == 16
    shape = (rows, rows.stride(0), rows.shape[0], rows.shape[1], out.shape[0], out)
    call(kernels, "host_sum", kind, narrow, vectors, *pairs, *shape)


@pytest.mark.parametrize("narrow", [True, False], ids=["uint32", "uint64"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [1, 8, 24])
@pytest.mark.parametrize("num_indices", [1, 2, 7, 500])
def test_sums_of_runs_over_any_number_of_chunks(kernels, narrow, dtype, width, num_indices):
    """Few indices make runs that cross many chunks of 32 pairs, many make several runs per chunk."""
    for count in (1, 31, 32, 33, 64, 700):
        rows = torch.randn(count, width).to(dtype)
        index = torch.randint(0, num_indices, (count,))
        out, storage, first = at((num_indices + 1, width), dtype, 0)
        out.zero_()
        call_sum(kernels, narrow, (None, 0, 0, 0, index, True, count), rows, out)
        exact = torch.zeros(num_indices + 1, width, dtype=torch.float64)
        exact.index_add_(0, index, rows.double())
        # summed in fp32 and rounded once: half an ulp of the dtype, and what fp32 sums of this length lose
        error = (out.double() - exact).abs()
        accumulated_in = torch.float64 if dtype == torch.float64 else torch.float32
        unit = torch.finfo(dtype).eps / 2 + 700 * torch.finfo(accumulated_in).eps
        size = torch.zeros_like(exact).index_add_(0, index, rows.double().abs())
        assert (error <= unit * size).all()
        assert canaries_intact(storage, first, out.nbytes)
        again = torch.zeros_like(out)
        call_sum(kernels, narrow, (None, 0, 0, 0, index, True, count), rows, again)
        assert torch.equal(out, again)


def test_sums_leave_out_indices_out_of_range(kernels):
    rows, index = torch.ones(6, 4), torch.tensor([0, 5, -1, 2, 9000000000, 2])
    for narrow in (True, False):
        out, storage, first = at((3, 4), torch.float32, 0)
        out.zero_()
        call_sum(kernels, narrow, (None, 0, 0, 0, index, True, 6), rows, out)
        assert out[:, 0].tolist() == [1, 0, 2]
        assert canaries_intact(storage, first, out.nbytes)


# ---- more rows, and more bytes, than 32 bits count


def test_addresses_beyond_32_bits(kernels):
    length, row_bytes = 3_000_000_000, 1152
    cu_seqlens = torch.tensor([0, length, length, 2 * length - 5])
    batch_stride = length * row_bytes
    for sequence, position in ((0, 0), (0, length - 1), (2, 0), (2, length - 6)):
        row = int(cu_seqlens[sequence]) + position
        expected = sequence * batch_stride + position * row_bytes
        arguments = (cu_seqlens, 3, length, batch_stride, row_bytes, row)
        assert call(kernels, "address_in_padded", *arguments) == expected
        row_of_padded = sequence * length + position
        arguments = (cu_seqlens, 2 * length - 5, length, row_bytes, row_of_padded)
        assert call(kernels, "address_in_packed", *arguments) == row * row_bytes


def test_interleaving_beyond_32_bits(kernels):
    first, second = torch.tensor([0, 2_500_000_000, 5_000_000_000]), torch.tensor([0, 4_000_000_000, 4_000_000_001])
    table = torch.zeros(1, 4)
    sources = Sources([table, table], [None, None], [first, second])
    sources.totals = [5_000_000_000, 4_000_000_001]
    cases = {
        (0, 0): 0, (1, 0): 2_500_000_000, (1, 3_999_999_999): 6_499_999_999, (0, 2_500_000_000): 6_500_000_000,
        (0, 4_999_999_999): 8_999_999_999, (1, 4_000_000_000): 9_000_000_000,
    }  # fmt: skip
    for (source, row), expected in cases.items():
        assert call(kernels, "destination_of", sources, 2, 2, source, row, 9_000_000_001) == expected
        assert call(kernels, "origin_of", sources, 2, 2, expected) == (source << 40) + row


def test_tiles_beyond_32_bits(kernels):
    rows, row_units = 3_000_000_001, 72
    found = (ctypes.c_int64 * 6)()
    last = (rows * row_units - 1) // 1024
    for tile in (0, 1, 123_456_789, last):
        call(kernels, "tile_of", tile, rows, row_units, found)
        units = min(1024, rows * row_units - tile * 1024)
        first_row, first_unit = divmod(tile * 1024, row_units)
        num_rows = (tile * 1024 + units - 1) // row_units - first_row + 1
        assert list(found) == [tile * 1024, first_row, first_unit, units, num_rows, last + 1]
