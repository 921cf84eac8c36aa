"""Parts of a ``.ztok`` file: the tensors' bytes taken in order, and the numbers of its JSON checked."""

from __future__ import annotations

import math
import sys
import zlib
from typing import TypeGuard

import numpy as np

from ztok_fast.codec.bitpack import MAX_BITS, packed_size, unpack_codes
from ztok_fast.codec.errors import ZFileError

LARGEST_COUNT = (1 << 31) - 1


class Reader:
    """Takes the parts of one tensor in order and refuses to read past its end or to leave anything."""

    def __init__(self, name: str, data: np.ndarray) -> None:
        self.name, self.data, self.used = name, data, 0

    def take(self, count: int) -> bytes:
        left = len(self.data) - self.used
        if count > left:
            raise ZFileError(f"{self.name}: expected {count} more bytes, got {left}")
        self.used += count
        return self.data[self.used - count : self.used].tobytes()

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.used)

    def codes(self, count: int, bits: int) -> np.ndarray:
        try:
            return unpack_codes(self.take(packed_size(count, bits)), bits, count)
        except ZFileError:
            raise
        except ValueError as error:
            raise ZFileError(f"{self.name}: {error}") from error

    def zlib(self, stored: int, length: int) -> bytes:
        # Never more than was stated: a few bytes can inflate to gigabytes.
        inflater = zlib.decompressobj()
        try:
            data = inflater.decompress(self.take(stored), length + 1)
        except zlib.error as error:
            raise ZFileError(f"{self.name}: expected a zlib stream, got {error}") from error
        if len(data) != length or not inflater.eof or inflater.unused_data:
            raise ZFileError(f"{self.name}: expected a zlib stream of {length} bytes, got another length")
        return data

    def finish(self) -> None:
        if self.used != len(self.data):
            raise ZFileError(f"{self.name}: expected {self.used} bytes, got {len(self.data)}")


def bits_for(size: int) -> int:
    """Bits of one of ``size`` different values, at least 1."""
    return max(1, (size - 1).bit_length())


def checked_bits(name: str, bits: int) -> int:
    if not 1 <= bits <= MAX_BITS:
        raise ZFileError(f"{name}: expected 1 to {MAX_BITS}, got {bits}")
    return bits


def read_count(entry: dict, name: str) -> int:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_COUNT:
        raise ZFileError(f"{name}: expected a count, got {str(value)[:40]}")
    return value


def json_number(value: float) -> float | None:
    """JSON has no NaN: the ratio and rate of an empty document are null."""
    return None if math.isnan(value) else value


def same_number(stated: object, computed: float) -> bool:
    if math.isnan(computed):
        return stated is None
    return is_number(stated) and math.isclose(stated, computed, rel_tol=1e-9)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a number that a float holds; JSON's integers have no largest one."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
