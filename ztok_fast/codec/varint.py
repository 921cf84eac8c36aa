"""Whole numbers in as few bytes as they need: 7 bits a byte, lowest first, the top bit set where more follow."""

from __future__ import annotations

from ztok_fast.codec.errors import ZFileError

MOST_BYTES = 9


def varint(value: int) -> bytes:
    """A number from 0 to 2^63 - 1."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at ``at``, and where it ends.

    Raises:
        ZFileError: the data end within it, or it has more than `MOST_BYTES` bytes.
    """
    value = 0
    for index in range(MOST_BYTES):
        if at + index >= len(data):
            raise ZFileError("number: expected more bytes, got the end: the file is truncated")
        byte = data[at + index]
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, at + index + 1
    raise ZFileError(f"number: expected at most {MOST_BYTES} bytes, got more: the file is damaged")
