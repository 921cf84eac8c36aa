"""The slots of Z-tokens as a range-coded stream.

One stream has, for all Z-tokens of a batch, in this order: the slots that each fills; for every filled slot the tokens
between it and the one before in its unit; the tokens after a unit's last filled slot; the codes. Each kind has a table
of counts of its own that starts even and learns from every symbol: it costs about what its own statistics say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.codec.errors import ZFileError
from ztok_fast.codec.ztokens import ZTokens
from ztok_fast.ops import decode_symbols, range_decoder, range_encode, symbol_intervals
from ztok_fast.ops.entropy.range_encode import Streams

INCREMENT = 24
"""By how much a symbol's count grows each time it comes; all start at 1."""


def encode_slots(z: ZTokens, codebook_size: int, max_unit_length: int, codes: bool = True) -> bytes:
    """The stream of a batch of slots; ``codes=False`` leaves the codes out, to know what the rest takes."""
    filled, gaps, tails = _structure(z)
    parts = [(filled, z.num_codebooks + 1), (gaps, max_unit_length), (tails, max_unit_length + 1)]
    if codes:
        parts.append((z.codes[z.codes >= 0].long(), codebook_size))
    return _encode(parts)


def encode_tokens(tokens: Tensor, vocabulary: int) -> bytes:
    """The stream of token ids alone, int64 ``[N]``, coded as the codes of slots are."""
    return _encode([(tokens, vocabulary)])


def _encode(parts: list[tuple[Tensor, int]]) -> bytes:
    """One stream of symbols int64 ``[N]``, each kind with its number of different ones."""
    found = [symbol_intervals(symbols, *_table(size, len(symbols)), INCREMENT) for symbols, size in parts]
    start, size, total = (torch.cat(values) for values in zip(*found))
    cu = torch.tensor([0, len(start)], dtype=torch.int64)
    return range_encode(start, size, total, cu).to_bytes()[0]


def decode_slots(
    data: bytes, ztokens: int, slots: int, codebook_size: int, max_unit_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int32 ``[K, L]``, unit lengths int32 ``[K]`` and slot offsets int32 ``[K, L]`` of a stream.

    Raises:
        ZFileError: the stream does not hold ``ztokens`` Z-tokens of ``slots`` slots.
    """
    packed, cu_bytes = Streams.from_bytes([data])
    state = range_decoder(packed, cu_bytes)

    def read(count: int, size: int) -> Tensor:
        nonlocal state
        counts, cu = _table(size, count)
        symbols, state = decode_symbols(counts, state, packed, cu, count, INCREMENT)
        return symbols

    filled = read(ztokens, slots + 1)
    count = int(filled.sum())
    gaps, tails = read(count, max_unit_length), read(ztokens, max_unit_length + 1)
    named = read(count, codebook_size)
    used = torch.arange(slots) < filled[:, None]
    codes = torch.full((ztokens, slots), -1, dtype=torch.int32)
    codes[used] = named.int()
    steps = torch.zeros(ztokens, slots, dtype=torch.int64)
    steps[used] = gaps + 1
    ends = steps.cumsum(1)
    lengths = ends[:, -1] + tails if slots else tails
    if ztokens and (int(lengths.min()) < 1 or int(lengths.max()) > max_unit_length):
        raise ZFileError(f"slots: expected units of 1 to {max_unit_length} tokens, got others: the file is damaged")
    places = torch.where(used, ends - 1, -1).int()
    return codes, lengths.int(), places


def _structure(z: ZTokens) -> tuple[Tensor, Tensor, Tensor]:
    assert z.slot_offsets is not None
    used = z.codes >= 0
    places = z.slot_offsets.long()
    before = torch.nn.functional.pad(places, (1, 0), value=-1)[:, :-1]
    # Filled slots come first in a unit, in the order of the text.
    gaps = (places - before - 1)[used]
    last = places.amax(1) if z.num_codebooks else places.new_full((len(places),), -1)
    return used.sum(1), gaps, z.unit_lengths.long() - 1 - last


def _table(size: int, count: int) -> tuple[Tensor, Tensor]:
    return torch.ones(size, dtype=torch.int64), torch.tensor([0, count], dtype=torch.int64)
