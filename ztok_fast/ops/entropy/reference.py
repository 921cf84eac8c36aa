"""Plain PyTorch and Python intervals and coding; they define the results of the entropy ops."""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.arithmetic import exp
from ztok_fast.ops.entropy.coder import BYTES_AT_END, BYTES_PER_SYMBOL, RangeDecoder, RangeEncoder

# elements of the largest block of counts that is held
_BLOCK_ELEMENTS = 1 << 20
MODEL_LIMIT = 1 << 16  # a table that learns is halved when its total exceeds this


def token_counts(logits: Tensor) -> Tensor:
    """int64 [T, V], the count of each token: 1 + rint(exp(logit - largest) * 2^30). 0 in a row that is not finite."""
    weights = exp(logits - logits.amax(1, keepdim=True)).double() * 2**30
    finite = logits.isfinite().all(1, keepdim=True)
    return torch.where(finite, weights, -1).round().long() + 1


def token_intervals(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `ztok_fast.ops.token_intervals`. O(T V) time, in blocks."""
    start, size, total = (torch.empty_like(targets, memory_format=torch.contiguous_format) for _ in range(3))
    step = max(1, _BLOCK_ELEMENTS // logits.shape[1])
    for first in range(0, logits.shape[0], step):
        part = slice(first, first + step)
        sums = token_counts(logits[part]).cumsum(1)
        end = sums.gather(1, targets[part, None])[:, 0]
        size[part] = token_counts_of(sums, targets[part])
        start[part] = end - size[part]
        total[part] = sums[:, -1]
    return start, size, total


def token_counts_of(sums: Tensor, tokens: Tensor) -> Tensor:
    """The counts of tokens, from the cumulative sums [T, V] of all."""
    before = sums.gather(1, (tokens - 1).clamp(min=0)[:, None])[:, 0]
    return sums.gather(1, tokens[:, None])[:, 0] - torch.where(tokens > 0, before, 0)


def range_encode(start: Tensor, size: Tensor, total: Tensor, cu_symbols: Tensor) -> tuple[Tensor, Tensor]:
    """See `ztok_fast.ops.range_encode`."""
    symbols, offsets = list(zip(start.tolist(), size.tolist(), total.tolist())), cu_symbols.tolist()
    capacity = BYTES_PER_SYMBOL * len(symbols) + BYTES_AT_END * (len(offsets) - 1)
    data, cu_bytes = bytearray(), [0]
    for first, last in zip(offsets, offsets[1:]):
        encoder = RangeEncoder()
        for symbol in symbols[first:last]:
            encoder.encode(*symbol)
        data += encoder.finish()
        cu_bytes.append(len(data))
    data += bytes(capacity - len(data))
    packed = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return packed.to(start.device), torch.tensor(cu_bytes, device=start.device)


def decode_tokens(logits: Tensor, state: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """See `ztok_fast.ops.decode_tokens`."""
    if logits.shape[0] == 0:
        return state.new_empty(0), state.new_empty(state.shape)
    sums = token_counts(logits).cumsum(1)
    totals, stream = sums[:, -1].tolist(), data.cpu().numpy().tobytes()
    if min(totals) == 0:
        checks.fail("decode_tokens", "logits", "finite", "NaN or infinity in it")
    decoders = [RangeDecoder.from_row(row) for row in state.tolist()]
    wanted = [decoder.peek(total) for decoder, total in zip(decoders, totals)]
    tokens = torch.searchsorted(sums, torch.tensor(wanted, device=sums.device)[:, None], right=True)[:, 0]
    sizes = token_counts_of(sums, tokens)
    starts = sums.gather(1, tokens[:, None])[:, 0] - sizes
    intervals = zip(starts.tolist(), sizes.tolist(), totals)
    rows = [decoder.consume(*interval, stream).to_row() for decoder, interval in zip(decoders, intervals)]
    return tokens, torch.tensor(rows, device=state.device)


class Model:
    """A table of counts that learns from the symbols that it codes."""

    def __init__(self, counts: list[int], increment: int) -> None:
        self._counts, self._increment, self.total = list(counts), increment, sum(counts)

    def interval(self, symbol: int) -> tuple[int, int, int]:
        """(start, size, total) of a symbol."""
        return sum(self._counts[:symbol]), self._counts[symbol], self.total

    def find(self, value: int) -> int:
        """The symbol whose interval contains a value below the total."""
        symbol = 0
        while value >= self._counts[symbol]:
            value -= self._counts[symbol]
            symbol += 1
        return symbol

    def learn(self, symbol: int) -> None:
        """Add to the symbol's count; halve all, rounding up, where the total has become too large."""
        self._counts[symbol] += self._increment
        self.total += self._increment
        if self._increment and self.total > MODEL_LIMIT:
            self._counts = [(count + 1) // 2 for count in self._counts]
            self.total = sum(self._counts)


def _models(counts: Tensor, streams: int, increment: int) -> list[Model]:
    tables = counts.tolist() if counts.ndim == 2 else [counts.tolist()] * streams
    return [Model(table, increment) for table in tables]


def symbol_intervals(symbols: Tensor, counts: Tensor, cu_symbols: Tensor, increment: int):
    """See `ztok_fast.ops.symbol_intervals`."""
    values, offsets, found = symbols.tolist(), cu_symbols.tolist(), []
    for model, first, last in zip(_models(counts, len(offsets) - 1, increment), offsets, offsets[1:]):
        for symbol in values[first:last]:
            found.append(model.interval(symbol))
            model.learn(symbol)
    intervals = torch.tensor(found, dtype=torch.int64, device=symbols.device).reshape(-1, 3)
    start, size, total = (column.clone() for column in intervals.unbind(1))
    return start, size, total


def decode_symbols(counts: Tensor, state: Tensor, data: Tensor, cu_symbols: Tensor, total: int, increment: int):
    """See `ztok_fast.ops.decode_symbols`."""
    offsets, stream, symbols, rows = cu_symbols.tolist(), data.cpu().numpy().tobytes(), [], []
    models = _models(counts, len(offsets) - 1, increment)
    for model, row, first, last in zip(models, state.tolist(), offsets, offsets[1:]):
        decoder = RangeDecoder.from_row(row)
        for _ in range(first, last):
            symbol = model.find(decoder.peek(model.total))
            decoder = decoder.consume(*model.interval(symbol), stream)
            model.learn(symbol)
            symbols.append(symbol)
        rows.append(decoder.to_row())
    device = state.device
    states = torch.tensor(rows, dtype=torch.int64, device=device).reshape(state.shape)
    return torch.tensor(symbols, dtype=torch.int64, device=device), states
