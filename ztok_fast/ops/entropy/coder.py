"""The range coder in Python's integers: the definition that `csrc/cpu/range_coder.h` follows.

A stream is a number in [0, 1), its bytes the digits after the point to the base 256; digits that are left out are 0.
Coding a symbol narrows an interval of numbers, of which 64 bits are kept exactly, to the symbol's share of it (Martin,
"Range encoding", 1979). A carry goes into the bytes already written, so no precision is lost to avoid one.
"""

from __future__ import annotations

from typing import NamedTuple

WORD = 2**64 - 1
LEAST_RANGE = 1 << 56
TOTAL_LIMIT = 1 << 49  # a share of the range is at least 2^7 wide, so a symbol writes at most seven bytes
BYTES_PER_SYMBOL, BYTES_AT_END = 7, 8
STATE_WORDS = 4  # range, value, position, end


class RangeEncoder:
    """Codes symbols by their (start, size, total), 0 <= start < start + size <= total < 2^49."""

    def __init__(self) -> None:
        self._low, self._range, self._digits = 0, WORD, bytearray()

    def encode(self, start: int, size: int, total: int) -> None:
        """Narrow the interval."""
        share = self._range // total
        self._add(share * start)
        self._range = share * size
        while self._range < LEAST_RANGE:
            self._digits.append(self._low >> 56)
            self._low, self._range = self._low << 8 & WORD, self._range << 8

    def finish(self) -> bytes:
        """The stream: the fewest digits of a number in the interval."""
        for digits in range(9):
            distance = -self._low % (1 << (64 - 8 * digits))  # to the next number with only so many digits
            if distance < self._range:
                self._add(distance)
                self._digits += self._low.to_bytes(8, "big")[:digits]
                break
        return bytes(self._digits).rstrip(b"\0")

    def _add(self, amount: int) -> None:
        self._low += amount
        if self._low > WORD:
            self._low -= WORD + 1
            at = len(self._digits) - 1
            while self._digits[at] == 255:
                self._digits[at] = 0
                at -= 1
            self._digits[at] += 1


class RangeDecoder(NamedTuple):
    """A decoder between two symbols, as a row of the state tensor holds it.

    Attributes:
        range: width of the interval, in [2^56, 2^64).
        value: the number's digits in view, less the lower end of the interval.
        position: of the next digit.
        end: of the stream; digits from there on are 0.
    """

    range: int
    value: int
    position: int
    end: int

    @staticmethod
    def from_row(row: list[int]) -> RangeDecoder:
        """From int64, which holds the bits of unsigned numbers."""
        return RangeDecoder(row[0] & WORD, row[1] & WORD, row[2], row[3])

    def to_row(self) -> list[int]:
        """As int64."""
        return [_signed(self.range), _signed(self.value), self.position, self.end]

    def peek(self, total: int) -> int:
        """Which of `total` counts comes next; one of them whatever the digits are."""
        return min(self.value // (self.range // total), total - 1)

    def consume(self, start: int, size: int, total: int, data: bytes) -> RangeDecoder:
        """The decoder after the symbol whose interval contains what `peek` gave."""
        share = self.range // total
        width, value, position = share * size, self.value - share * start & WORD, self.position
        while width < LEAST_RANGE:
            inside = 0 <= position < min(self.end, len(data))
            width, value = width << 8, (value << 8 & WORD) | (data[position] if inside else 0)
            position += inside
        return RangeDecoder(width, value, position, self.end)


def _signed(word: int) -> int:
    return word - (word >> 63 << 64)
