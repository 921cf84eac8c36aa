"""Integer codes packed into bytes without gaps.

Code i of n bits fills bits [i·n, (i + 1)·n) of a bit stream, least significant bit first; bit k of the stream is bit
k % 8 of byte k // 8, and unused bits of the last byte are zero. So a list of codes has exactly one packed form. The C++
host module is used where it is built; the numpy path gives the same bytes.
"""

from __future__ import annotations

import operator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ztok_fast import native

MAX_BITS = 32


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take: ceil(count · bits / 8)."""
    return (_check_count(count) * _check_bits(bits) + 7) // 8


def pack_codes(codes: ArrayLike, bits: int) -> NDArray[np.uint8]:
    """Pack integer codes of any shape, read in C order, into ``uint8 [packed_size(codes.size, bits)]``.

    ``bits`` is the width of a code, 1 to 32. ``ValueError`` for another width, for an array that does not hold
    integers, and for a code outside [0, 2**bits).
    """
    _check_bits(bits)
    flat = _check_codes(codes, bits)
    module = native.host()
    return module.pack_bits(flat, bits) if module else _pack_numpy(flat, bits)


def unpack_codes(packed: NDArray[np.uint8] | bytes, bits: int, count: int) -> NDArray[np.int64]:
    """The inverse of `pack_codes`: ``count`` codes of ``bits`` bits as ``int64 [count]``.

    ``ValueError`` unless ``packed`` is bytes or a ``uint8`` vector of exactly ``packed_size(count, bits)`` bytes whose
    unused last bits are zero: other input was not made by `pack_codes`.
    """
    expected = packed_size(count, bits)
    data = np.frombuffer(packed, np.uint8) if isinstance(packed, (bytes, bytearray, memoryview)) else np.asarray(packed)
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ValueError(f"packed: expected bytes or a uint8 vector, got {data.dtype} of shape {list(data.shape)}")
    if data.size != expected:
        raise ValueError(f"packed: expected {expected} bytes for {count} codes of {bits} bits, got {data.size}")
    used = count * bits % 8
    if used and data[-1] >> used:
        raise ValueError(f"packed: expected zeros in the last {8 - used} bits, got {int(data[-1] >> used):#b}")
    data = np.ascontiguousarray(data)
    module = native.host()
    return module.unpack_bits(data, bits, count) if module else _unpack_numpy(data, bits, count)


def _pack_numpy(flat: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    octets = flat.astype("<u4").view(np.uint8).reshape(-1, 4)
    stream = np.unpackbits(octets, axis=1, count=bits, bitorder="little")  # [N, bits]
    return np.packbits(stream.reshape(-1), bitorder="little")


def _unpack_numpy(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    stream = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    octets = np.zeros((count, 4), np.uint8)
    octets[:, : (bits + 7) // 8] = np.packbits(stream, axis=1, bitorder="little")
    return octets.view("<u4").reshape(count).astype(np.int64)


def _check_bits(bits: int) -> int:
    if not _is_integer(bits) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits: expected an integer from 1 to {MAX_BITS}, got {bits!r}")
    return operator.index(bits)


def _check_count(count: int) -> int:
    if not _is_integer(count) or count < 0:
        raise ValueError(f"count: expected a number of codes, at least 0, got {count!r}")
    return operator.index(count)


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_codes(codes: ArrayLike, bits: int) -> NDArray[np.uint32]:
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size == 0:
        return np.empty(0, np.uint32)
    if flat.dtype.kind not in "iu":
        raise ValueError(f"codes: expected an array of integers, got {flat.dtype}")
    # Python integers compare exactly with every numpy integer type.
    low, high = int(flat.min()), int(flat.max())
    if low < 0 or high >= 2**bits:
        value = low if low < 0 else high
        index = int(np.flatnonzero(flat == value)[0])
        raise ValueError(f"codes: expected values in [0, 2**{bits}), got {value} at index {index}")
    return flat.astype(np.uint32)
