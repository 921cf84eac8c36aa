"""Windows: coded text in numbers below a fixed one, each with as many whole tokens as fit.

A stream of the range coder cuts tokens at any bit. A window is closed instead: its number and the tokens of the windows
before it give its tokens. All numbers are shared out token by token. Of the ``codes`` numbers that are left, the last
says that the window ends here; each token gets its share of the others by its probability, rounded down, and the next
token shares out that range. A token whose share is nothing does not fit, and begins the next window. There the last
numbers are one for each token of the vocabulary, so that any token fits an empty window. What is lost is what is left
of a window when the next token does not fit, and the numbers that say so, a small part of the range each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ztok_fast.codec.errors import CodecError, ZBatchError
from ztok_fast.codec.reading import Intervals, Reader
from ztok_fast.ops import decode_tokens, token_intervals

_TOP = 64


def _narrow(codes: int, spare: int, start: int, size: int, total: int) -> tuple[int, int]:
    """Where a token's range begins among ``codes`` numbers, of which the last ``spare`` are none's, and its size."""
    shared = codes - spare
    low = shared * start // total
    return low, shared * (start + size) // total - low


class _State:
    """A segment's place in its windows: how many numbers are still possible, and which of them it is."""

    def __init__(self, windows: Sequence[int], codes: int) -> None:
        self._windows, self._all = iter(windows), codes
        self.codes, self.place = codes, next(self._windows)
        self.empty, self.ended = True, False

    def narrow(self, first: int, codes: int) -> None:
        """After a token, whose range is given; goes to the next window if this one ends here."""
        self.codes, self.place, self.empty = codes, self.place - first, False
        if self.place == codes - 1:
            following = next(self._windows, None)
            if following is None:
                self.ended = True
            else:
                self.codes, self.place, self.empty = self._all, following, True


class Windows:
    """Codes segments of tokens in windows.

    Args:
        reader: of the base model; vocabulary: its tokens; codes: numbers of a window, more than the vocabulary has.
    """

    def __init__(self, reader: Reader, vocabulary: int, codes: int) -> None:
        if not vocabulary < codes <= 1 << _TOP - 1:
            raise CodecError(f"windows: expected more than {vocabulary} numbers (a token each), got {codes}")
        self.reader, self.vocabulary, self.codes = reader, vocabulary, codes

    def encode(self, segments: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
        """Of every segment its windows: the number, and how many tokens it holds."""
        start, size, total = (values.tolist() for values in self.reader.intervals(segments))
        found, at = [], 0
        for segment in segments:
            own = slice(at, at + len(segment))
            found.append(self._encode(segment, start[own], size[own], total[own]))
            at += len(segment)
        return found

    def _encode(
        self, tokens: Sequence[int], starts: list[int], sizes: list[int], totals: list[int]
    ) -> list[tuple[int, int]]:
        windows, first, codes, count = [], 0, self.codes, 0
        for token, start, size, total in zip(tokens, starts, sizes, totals):
            if count:
                low, share = _narrow(codes, 1, start, size, total)
                if share:
                    first, codes, count = first + low, share, count + 1
                    continue
                windows.append((first + codes - 1, count))
            first, codes = _narrow(self.codes, self.vocabulary, start, size, total)
            if not codes:
                first, codes = self.codes - self.vocabulary + token, 1
            count = 1
        if count:
            windows.append((first + codes - 1, count))
        return windows

    def decode(self, segments: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
        """The tokens of segments by the numbers of their first windows, or of all.

        Args:
            limit: most tokens of a segment.

        Raises:
            ZBatchError: a number that is no window's, or more tokens than ``limit``: the windows are damaged.
        """
        for own in segments:
            if any(not 0 <= number < self.codes for number in own):
                raise ZBatchError(f"windows: expected numbers from 0 to {self.codes - 1}, got others")
        there = [index for index, own in enumerate(segments) if own]
        states = [_State(segments[index], self.codes) for index in there]

        def choose(logits: Tensor, running: Tensor) -> tuple[Tensor, Tensor]:
            return self._step(logits, [states[index] for index in running.tolist()])

        written, sizes = self.reader.write(torch.full((len(there),), limit), choose)
        found: list[list[int]] = [[] for _ in segments]
        for index, state, row, size in zip(there, states, written.tolist(), sizes.tolist()):
            if not state.ended:
                raise ZBatchError(f"windows: expected at most {limit} tokens of a segment, got more: they are damaged")
            found[index] = row[:size]
        return found

    def _step(self, logits: Tensor, states: list[_State]) -> tuple[Tensor, Tensor]:
        totals = token_intervals(logits, torch.zeros(len(states), dtype=torch.int64))[2].tolist()
        rows, literals = [], {}
        for row, (state, total) in enumerate(zip(states, totals)):
            shared = state.codes - (self.vocabulary if state.empty else 1)
            value = 0
            if state.place < shared:
                # The token whose range contains the place: the last that begins at it or before.
                value = ((state.place + 1) * total - 1) // shared
            else:
                literals[row] = state.place - shared
            # A decoder whose shares are powers of two finds the token by its count.
            shift = _TOP - total.bit_length()
            rows.append([_signed(total << shift), _signed(value << shift), 0, 0])
        tokens, _ = decode_tokens(logits, torch.tensor(rows), torch.empty(0, dtype=torch.uint8))
        for row, token in literals.items():
            tokens[row] = token
        intervals = Intervals(*token_intervals(logits, tokens))
        for row, (state, start, size, total) in enumerate(zip(states, *(values.tolist() for values in intervals))):
            if row in literals:
                state.narrow(state.place, 1)
            else:
                spare = self.vocabulary if state.empty else 1
                state.narrow(*_narrow(state.codes, spare, start, size, total))
        return tokens, torch.tensor([state.ended for state in states])


def _signed(word: int) -> int:
    return word - (word >> 63 << 64)
