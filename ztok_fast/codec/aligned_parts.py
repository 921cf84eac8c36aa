"""Parts of a text as aligned windows (`ztok_fast.codec.windows`), as a file has them (docs/file-format.md)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from ztok_fast.codec.errors import CodecError, ZFileError
from ztok_fast.codec.varint import read_varint, varint

MOST_BITS = 63


class ZTokenSize(NamedTuple):
    """A Z-token's size: L codes from V."""

    levels: int = 4
    codebook_size: int = 2048

    @property
    def values(self) -> int:
        return self.codebook_size**self.levels

    def check(self, vocabulary: int) -> ZTokenSize:
        """Raise `CodecError` unless such a Z-token has more values than there are tokens, and at most 63 bits."""
        for name, value, least in (("levels", self.levels, 1), ("codebook_size", self.codebook_size, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise CodecError(f"{name}: expected an integer of at least {least}, got {value!r}")
        if self.levels > MOST_BITS or not vocabulary < self.values <= 1 << MOST_BITS:
            raise CodecError(
                f"coded units: expected Z-tokens of more values than the {vocabulary} tokens of the base model and at "
                f"most 2^{MOST_BITS}, got {self.codebook_size}^{self.levels}"
            )
        return self


class AlignedPart(NamedTuple):
    """The windows of a part: of each segment the numbers; and the tokens of all of it."""

    size: ZTokenSize
    tokens: int
    windows: list[list[int]]

    def to_bytes(self) -> bytes:
        numbers = [self.size.levels, self.size.codebook_size, self.tokens, *map(len, self.windows)]
        packed = _pack([number for own in self.windows for number in own], _bits(self.size))
        return b"".join(map(varint, numbers)) + packed


def read_aligned(payload: bytes, most_tokens: int, context: int, vocabulary: int) -> AlignedPart:
    """The inverse of `AlignedPart.to_bytes`.

    Args:
        most_tokens: that the part may have; context: tokens of a segment; vocabulary: tokens of the base model.

    Raises:
        ZFileError: the bytes are no such part.
    """
    levels, at = read_varint(payload, 0)
    codebook_size, at = read_varint(payload, at)
    total, at = read_varint(payload, at)
    try:
        size = ZTokenSize(levels, codebook_size).check(vocabulary)
    except CodecError as error:
        raise ZFileError(f"aligned part: {error}: the file is damaged") from error
    if not 1 <= total <= most_tokens:
        raise ZFileError(f"aligned part: expected 1 to {most_tokens} tokens, got {total}: the file is damaged")
    counts = []
    for begin in range(0, total, context):
        count, at = read_varint(payload, at)
        most = min(context, total - begin)
        if not 1 <= count <= most:
            raise ZFileError(f"aligned part: expected 1 to {most} windows of a segment, got {count}: it is damaged")
        counts.append(count)
    bits = _bits(size)
    if len(payload) - at != -(-sum(counts) * bits // 8):
        raise ZFileError(f"aligned part: expected {sum(counts)} windows, got {len(payload) - at} bytes: it is damaged")
    numbers = iter(_unpack(payload[at:], bits, sum(counts)))
    return AlignedPart(size, total, [list(islice(numbers, count)) for count in counts])


def _bits(size: ZTokenSize) -> int:
    return (size.values - 1).bit_length()


def _pack(numbers: Sequence[int], bits: int) -> bytes:
    rows = np.array(numbers, dtype="<u8").view(np.uint8).reshape(-1, 8)
    return np.packbits(np.unpackbits(rows, axis=1, bitorder="little")[:, :bits], bitorder="little").tobytes()


def _unpack(data: bytes, bits: int, count: int) -> list[int]:
    rows = np.zeros((count, 64), np.uint8)
    found = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    rows[:, :bits] = found.reshape(count, bits)
    return np.packbits(rows, axis=1, bitorder="little").view("<u8")[:, 0].tolist()
