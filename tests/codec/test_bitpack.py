"""Bit packing: both paths against a bit-by-bit definition, and against each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztok_fast import native
from ztok_fast.codec import bitpack
from ztok_fast.codec.bitpack import pack_codes, packed_size, unpack_codes


@pytest.fixture(scope="module", params=["host", "numpy"], autouse=True)
def path(request):
    """Every test of this file runs on the C++ module and on numpy."""
    if request.param == "host" and native.host() is None:
        pytest.skip(f"host: {native.status('host').reason}")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(bitpack.native, "host", lambda: None)
        yield request.param


def definition(codes: list[int], bits: int) -> bytes:
    """All codes as one big little-endian integer."""
    return sum(code << (i * bits) for i, code in enumerate(codes)).to_bytes((len(codes) * bits + 7) // 8, "little")


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(1, 32))
    return draw(st.lists(st.integers(0, 2**bits - 1), max_size=40)), bits


@given(codes_and_bits())
def test_bytes_are_those_of_the_definition_and_come_back(case):
    codes, bits = case
    packed = pack_codes(np.array(codes, np.int64), bits)
    assert packed.dtype == np.uint8 and packed.tobytes() == definition(codes, bits)
    assert packed.size == packed_size(len(codes), bits)
    for data in (packed, packed.tobytes()):
        back = unpack_codes(data, bits, len(codes))
        assert back.dtype == np.int64 and back.tolist() == codes


@pytest.mark.parametrize("bits", range(1, 33))
def test_largest_code_of_every_width(bits):
    codes = [2**bits - 1, 0, 2**bits - 1]
    assert unpack_codes(pack_codes(np.array(codes, np.uint64), bits), bits, 3).tolist() == codes


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64, ">i4"])
def test_any_integer_dtype_shape_and_stride(dtype):
    codes = (np.arange(24) % 8).astype(dtype).reshape(4, 6)
    assert pack_codes(codes, 3).tobytes() == definition(codes.reshape(-1).tolist(), 3)
    assert pack_codes(codes.T[::2], 3).tobytes() == definition(codes.T[::2].reshape(-1).tolist(), 3)


def test_nothing_to_pack():
    assert pack_codes([], 12).size == 0
    assert unpack_codes(b"", 12, 0).size == 0


@pytest.mark.parametrize("bits", [0, 33, -1, 4.0, True, None, "4"], ids=repr)
def test_bad_width(bits):
    for call in (lambda: pack_codes([1], bits), lambda: unpack_codes(b"\0", bits, 1), lambda: packed_size(1, bits)):
        with pytest.raises(ValueError, match="bits: expected an integer from 1 to 32"):
            call()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([0, 16], r"codes: expected values in \[0, 2\*\*4\), got 16 at index 1"),
        ([0, 1, -1], r"codes: expected values in \[0, 2\*\*4\), got -1 at index 2"),
        (np.array([2**64 - 1], np.uint64), "got 18446744073709551615 at index 0"),
        ([0.5], "codes: expected an array of integers, got float64"),
        ([True], "codes: expected an array of integers, got bool"),
    ],
    ids=["too_wide", "negative", "huge", "float", "bool"],
)
def test_bad_codes(codes, message):
    with pytest.raises(ValueError, match=message):
        pack_codes(codes, 4)


@pytest.mark.parametrize("count", [-1, 1.0, True, None], ids=repr)
def test_bad_count(count):
    with pytest.raises(ValueError, match="count: expected a number of codes, at least 0"):
        unpack_codes(b"", 4, count)


@pytest.mark.parametrize(
    ("packed", "count", "message"),
    [
        (b"\0", 4, "packed: expected 2 bytes for 4 codes of 4 bits, got 1"),
        (b"\0\0\0", 4, "packed: expected 2 bytes for 4 codes of 4 bits, got 3"),
        (b"\0\x1f", 3, "packed: expected zeros in the last 4 bits, got 0b1"),
        (np.zeros(2, np.int8), 4, "packed: expected bytes or a uint8 vector, got int8"),
        (np.zeros((1, 2), np.uint8), 4, "packed: expected bytes or a uint8 vector, got uint8 of shape"),
        (b"\0", 2**62, "packed: expected 2305843009213693952 bytes"),
    ],
    ids=["short", "long", "padding", "dtype", "rank", "huge_count"],
)
def test_foreign_bytes(packed, count, message):
    with pytest.raises(ValueError, match=message):
        unpack_codes(packed, 4, count)


@pytest.mark.skipif(native.host() is None, reason=f"host: {native.status('host').reason}")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda host: host.pack_bits(np.array([4], np.uint32), 2), r"codes: expected values below 2\*\*2, got 4"),
        (lambda host: host.pack_bits(np.array([4], np.uint32), 33), "bits: expected 1 to 32, got 33"),
        (lambda host: host.unpack_bits(np.zeros(1, np.uint8), 0, 1), "bits: expected 1 to 32, got 0"),
        (lambda host: host.unpack_bits(np.zeros(1, np.uint8), 8, -1), "count: expected a number of codes"),
        (lambda host: host.unpack_bits(np.zeros(1, np.uint8), 32, 2**62), "count: expected a number of codes"),
        (lambda host: host.unpack_bits(np.zeros(1, np.uint8), 8, 2), "packed: expected 2 bytes"),
    ],
    ids=["codes", "pack_bits", "unpack_bits", "negative", "overflow", "short"],
)
def test_host_module_is_safe_without_the_python_checks(call, message):
    import ztok_fast._host as host

    with pytest.raises(ValueError, match=message):
        call(host)
