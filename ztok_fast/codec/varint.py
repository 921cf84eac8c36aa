"""Whole numbers in as few bytes as they need: 7 bits a byte, lowest first, the top bit set where more follow."""

from __future__ import annotations

from collections.abc import Sequence

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


def join_parts(parts: Sequence[bytes]) -> bytes:
    """Parts one after another, behind the lengths of all but the last; nothing where all are empty."""
    if not any(parts):
        return b""
    return b"".join([varint(len(part)) for part in parts[:-1]] + list(parts))


def split_parts(data: bytes, count: int) -> list[bytes]:
    """The inverse of `join_parts`.

    Raises:
        ZFileError: the data do not hold ``count`` parts.
    """
    if not data:
        return [b""] * count
    if not count:
        raise ZFileError(f"parts: expected none, got {len(data)} bytes: they are damaged")
    sizes, at, parts = [], 0, []
    for _ in range(count - 1):
        size, at = read_varint(data, at)
        sizes.append(size)
    sizes.append(len(data) - at - sum(sizes))
    if sizes[-1] < 0:
        raise ZFileError(f"parts: expected {len(data) - at} bytes, got lengths of more: they are damaged")
    for size in sizes:
        parts.append(data[at : at + size])
        at += size
    return parts
