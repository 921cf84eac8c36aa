"""The slots of Z-tokens as range-coded streams, with the inferencer as the prior.

`slot_coding` learns from what it has coded; here the inferencer says how likely each code is after the Z-tokens before
it. It runs in the engine, and the products of its head are sums in one fixed order, so that a reader has the counts of
the writer on any machine (docs/determinism.md). Writing is one packed pass. Reading goes step by step, many streams
side by side.

A document is cut into *stretches* of at most `CONTEXT` Z-tokens, each a sequence of its own for the inferencer and a
stream of its own. The first stream begins with where the slots stand, by tables that learn: at low ratios they know it
as well as the inferencer, which is not told the ratio, and at high ones far better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ztok_fast.codec.errors import CodecError, ZFileError
from ztok_fast.codec.layout import expand_ranges, offsets, sequence_of_row
from ztok_fast.codec.slot_coding import INCREMENT
from ztok_fast.codec.slot_model import SlotModel
from ztok_fast.codec.slot_space import GAPS
from ztok_fast.codec.varint import read_varint, varint
from ztok_fast.codec.ztokens import ZTokens, one_each
from ztok_fast.ops import (
    decode_symbols,
    decode_tokens,
    ordered_linear,
    ordered_pack,
    ragged_gather,
    range_decoder,
    range_encode,
    symbol_intervals,
    token_intervals,
)
from ztok_fast.ops.entropy.range_encode import Streams

CONTEXT = 512
"""Z-tokens that the inferencer sees at most, with the start mark."""

ROWS = 128
"""Streams that are read side by side."""

LIKELY = 4
"""Share of a new table that a likely symbol has, against 1 for all others together."""


GAP_COUNTS = (48, 24, 12, 6, 3)
"""Counts that the table of gaps starts with; larger gaps start with 1."""

Read = Callable[[Tensor, Tensor], Tensor]
"""Reads one symbol for each of ``[T]`` documents, by a table that learns."""


@torch.inference_mode()
def encode(model: SlotModel, z: ZTokens) -> list[bytes]:
    """What stores the slots of each document; `decode` is the inverse.

    Raises:
        CodecError: the engine does not run the model.
    """
    z = z.to("cpu")
    layout, intervals, stream = _intervals(model, z)
    count = len(layout.begin)
    start, size, total = intervals.T.contiguous()
    streams = range_encode(start, size, total, offsets(stream.bincount(minlength=count))).to_bytes()
    bounds = layout.cu_stretches.tolist()
    return [join(streams[first:last]) for first, last in zip(bounds, bounds[1:])]


@torch.inference_mode()
def bits(model: SlotModel, z: ZTokens) -> Tensor:
    """Bits of each document's symbols in `encode`, float64 ``[n_documents]``; a stream takes at most 16 more."""
    z = z.to("cpu")
    layout, intervals, stream = _intervals(model, z)
    own = (intervals[:, 2].double() / intervals[:, 1].double()).log2()
    document = sequence_of_row(layout.cu_stretches, len(layout.begin))
    return own.new_zeros(len(z)).index_add_(0, document[stream], own)


@torch.inference_mode()
def decode(
    model: SlotModel, streams: Sequence[bytes], cu_segments: Tensor, cu_documents: Tensor, tokens: Sequence[int]
) -> ZTokens:
    """The Z-tokens of documents.

    Args:
        streams: of each document what `encode` gave, of this call or of several.
        cu_segments, cu_documents: int32, those of the Z-tokens (`ZTokens`), on the CPU.
        tokens: text tokens of each document.

    Raises:
        CodecError: the engine does not run the model.
        ZFileError: a document's bytes do not hold such Z-tokens.
    """
    prior, layout = _Prior(model), Layout(model, cu_segments, cu_documents)
    parts = []
    for document, (stored, count) in enumerate(zip(streams, layout.cu_stretches.diff().tolist())):
        try:
            parts += split(stored, count)
        except ZFileError as error:
            raise ZFileError(f"document {document}: {error}") from error
    data, cu_bytes = Streams.from_bytes(parts)
    state = range_decoder(data, cu_bytes)
    first = layout.cu_stretches[:-1].long()

    def read(document: Tensor, counts: Tensor) -> Tensor:
        cu = offsets(document.bincount(minlength=len(first)))
        symbols, state[first] = decode_symbols(counts, state[first], data, cu, len(document), INCREMENT)
        return symbols

    filled = layout.read_filled(read)
    places = layout.read_places(read, filled)
    tails, ends = layout.read_tails(read)
    z = ZTokens(torch.full_like(places, -1), filled.int(), cu_segments, cu_documents, places)
    # Longest first: a session goes on with its first sequences.
    order = layout.lengths.argsort(descending=True, stable=True)
    order = order[layout.lengths[order] > 0]
    for at in range(0, len(order), ROWS):
        own = order[at : at + ROWS]
        prior.read(z, layout.begin[own], layout.lengths[own], state[own], data)
    z.unit_lengths = layout.unit_lengths(z, tails, ends, torch.tensor(tokens, dtype=torch.int64))
    return z


def join(parts: Sequence[bytes]) -> bytes:
    """Parts one after another, behind the lengths of all but the last as varints."""
    return b"".join([varint(len(part)) for part in parts[:-1]] + list(parts))


def split(data: bytes, count: int) -> list[bytes]:
    """The inverse of `join`.

    Raises:
        ZFileError: the data do not hold ``count`` parts.
    """
    if count == 0 and data:
        raise ZFileError(f"streams: expected none, got {len(data)} bytes: the file is damaged")
    sizes, at, parts = [], 0, []
    for _ in range(count - 1):
        size, at = read_varint(data, at)
        sizes.append(size)
    left = len(data) - at - sum(sizes)
    if left < 0:
        raise ZFileError(f"streams: expected {len(data) - at} bytes, got lengths of more: the file is damaged")
    for size in [*sizes, left][:count]:
        parts.append(data[at : at + size])
        at += size
    return parts


class Layout:
    """Where the Z-tokens of documents lie, as writer and reader know it before the first symbol.

    Attributes:
        document: int64 ``[K]``, of every Z-token; segment likewise.
        cu_stretches: int32 ``[n_documents + 1]``; a document has one stretch at least.
        begin, lengths: int64, first Z-token and Z-tokens of every stretch.
    """

    def __init__(self, model: SlotModel, cu_segments: Tensor, cu_documents: Tensor) -> None:
        self._config = model.config
        cu_rows = cu_segments[cu_documents.long()].long()
        total, sizes = int(cu_rows[-1]), cu_rows.diff()
        self.document = sequence_of_row(cu_rows, total)
        self.segment = sequence_of_row(cu_segments, total)
        self.cu_stretches = offsets(((sizes + CONTEXT - 1) // CONTEXT).clamp(min=1))
        owner = sequence_of_row(self.cu_stretches, int(self.cu_stretches[-1]))
        index = torch.arange(len(owner)) - self.cu_stretches.long()[owner]
        self.begin = cu_rows[owner] + index * CONTEXT
        self.lengths = (cu_rows[owner + 1] - self.begin).clamp(max=CONTEXT)
        ends = torch.zeros(total, dtype=torch.bool)
        ends[cu_segments[1:][cu_segments.diff() > 0].long() - 1] = True
        last = torch.zeros(total, dtype=torch.bool)
        last[cu_rows[1:][sizes > 0] - 1] = True
        self._inner, self._ends = (~ends).nonzero()[:, 0], ends.nonzero()[:, 0]
        self._between, self._last = (ends & ~last).nonzero()[:, 0], last.nonzero()[:, 0]

    def head(self, z: ZTokens) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What comes before the inferencer's symbols, kind after kind: symbols, the document of each, and a table.

        The slots filled by Z-tokens within a segment, then by those that end one; the tokens between each filled slot
        and the one before; the tokens after the last filled slot of Z-tokens within a segment, then of all that end a
        segment but not the document: 0 where the segment has as many tokens as it can have, else 1 more than the tokens
        after the last filled slot. For the document's last Z-token they follow from the document's tokens.
        """
        used, named = z.codes >= 0, _named(z)
        filled, tails = used.sum(1), z.unit_lengths.long() - named
        inner = named.clone()
        inner[self._inner] += tails[self._inner]
        own = tails[self._between]
        ends = torch.where(own == self._room(inner), 0, own + 1)
        within, at_end, after, last = self._tables()
        return [
            (filled[self._inner], self.document[self._inner], within),
            (filled[self._ends], self.document[self._ends], at_end),
            (_gaps(z)[used], self.document.repeat_interleave(filled), self._gap_table()),
            (tails[self._inner], self.document[self._inner], after),
            (ends, self.document[self._between], last),
        ]

    def read_filled(self, read: Read) -> Tensor:
        """Slots that each Z-token fills, int64 ``[K]``."""
        within, at_end, _, _ = self._tables()
        filled = torch.zeros(len(self.document), dtype=torch.int64)
        filled[self._inner] = read(self.document[self._inner], within)
        filled[self._ends] = read(self.document[self._ends], at_end)
        return filled

    def read_places(self, read: Read, filled: Tensor) -> Tensor:
        """Slot offsets int32 ``[K, L]``."""
        used = torch.arange(self._config.num_codebooks) < filled[:, None]
        steps = torch.zeros(used.shape, dtype=torch.int64)
        steps[used] = read(self.document.repeat_interleave(filled), self._gap_table()) + 1
        return torch.where(used, steps.cumsum(1) - 1, -1).int()

    def read_tails(self, read: Read) -> tuple[Tensor, Tensor]:
        """The last two kinds of `head`."""
        _, _, after, last = self._tables()
        return read(self.document[self._inner], after), read(self.document[self._between], last)

    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slots, longest = self._config.num_codebooks, self._config.max_unit_length
        return _table(slots + 1, slots), _table(slots + 1), _table(longest + 1, 0), _table(longest + 2, 0)

    def _gap_table(self) -> Tensor:
        counts = torch.ones(self._config.max_unit_length, dtype=torch.int64)
        for gap, count in enumerate(GAP_COUNTS[: len(counts)]):
            counts[gap] = count
        return counts

    def unit_lengths(self, z: ZTokens, tails: Tensor, ends: Tensor, tokens: Tensor) -> Tensor:
        """Unit lengths int32 ``[K]`` from the slots' places and the last two kinds of `head`.

        Raises:
            ZFileError: one is not a length that a unit can have.
        """
        lengths = _named(z)
        lengths[self._inner] += tails
        lengths[self._between] += torch.where(ends == 0, self._room(lengths), ends - 1)
        covered = torch.zeros_like(tokens).index_add_(0, self.document, lengths)
        lengths[self._last] += (tokens - covered)[self.document[self._last]]
        longest = self._config.max_unit_length
        if bool(((lengths < _named(z).clamp(min=1)) | (lengths > longest)).any()):
            raise ZFileError(f"slots: expected units of 1 to {longest} tokens, got others: the file is damaged")
        return lengths.int()

    def _room(self, lengths: Tensor) -> Tensor:
        """Tokens that units of such lengths leave of each segment that ends at ``_between``."""
        covered = lengths.new_zeros(int(self.segment[-1]) + 1 if len(lengths) else 0)
        covered.index_add_(0, self.segment, lengths)
        return self._config.segment_length - covered[self.segment[self._between]]


class _Prior:
    """The inferencer's logits, in the same bits for a row whatever the others."""

    def __init__(self, model: SlotModel) -> None:
        runtime = model.runtime
        if not runtime.exact:
            raise CodecError(
                "slots with the inferencer as prior: expected a codec whose base model the engine runs (int8 or "
                "float32), since a reader must find the same bits; got transformers' modules (float)"
            )
        head = model.zspace
        self.model, self.slots = model, model.config.num_codebooks
        self.words = runtime.linear(head.words, model.adapted.embedding.weight)
        self._gap_rows = head.gap_rows[:, :GAPS].float()
        # The inferencer chooses a gap before each code.
        self._queries = [ordered_pack(query) for query in head.queries[1::2]]
        self._panels = ordered_pack(self.words)

    def after_gap(self, slot: int, chosen: Tensor, gap: Tensor) -> Tensor:
        """``chosen`` ``[B, d]``, the rows of the choices before, with that of a gap before a slot."""
        return chosen + self._gap_rows[slot][gap.clamp(max=GAPS - 1)]

    def logits(self, hidden: Tensor, slot: int, chosen: Tensor) -> Tensor:
        """Of the token that a slot names, ``[B, V]``."""
        query = ordered_linear(hidden, self._queries[slot], self.words.shape[1]) + chosen
        return ordered_linear(query, self._panels, len(self.words))

    def marks(self, count: int) -> Tensor:
        """The row that each of ``count`` sequences begins with."""
        return self.model.zspace.marks[:1].float().expand(count, -1).contiguous()

    def hidden(self, z: ZTokens, layout: Layout) -> Tensor:
        """The states that predict each Z-token, ``[K, D]``."""
        used = layout.lengths > 0
        begin, lengths = layout.begin[used], layout.lengths[used]
        # A stretch is read but for its last Z-token, which nothing follows.
        rows, cu_rows = expand_ranges(begin, begin + lengths - 1)
        count = len(begin)
        cu_marks = torch.arange(count + 1, dtype=torch.int32)
        each = torch.zeros(count, dtype=torch.int64)
        embeddings = self.model.embed(z).float()
        joined = ragged_gather([self.marks(1), embeddings], [each, rows], [cu_marks, cu_rows])
        longest = int(lengths.max()) if count else 0
        return self.model.runtime.hidden(
            joined.values, joined.position_ids, joined.cu_seqlens, longest, adapter="inferencer"
        )

    def intervals(self, hidden: Tensor, z: ZTokens) -> tuple[Tensor, Tensor]:
        """Intervals int64 ``[R, 3]`` of the codes of Z-tokens, and the Z-token of each, int64 ``[R]``."""
        gaps, used = _gaps(z), z.codes >= 0
        cells = torch.zeros(*used.shape, 3, dtype=torch.int64)
        chosen = hidden.new_zeros(len(hidden), self.words.shape[1])
        for slot in range(self.slots):
            rows = used[:, slot].nonzero()[:, 0]
            code = z.codes[rows, slot].long()
            before = self.after_gap(slot, chosen[rows], gaps[rows, slot])
            cells[rows, slot] = torch.stack(token_intervals(self.logits(hidden[rows], slot, before), code), 1)
            chosen[rows] = before + self.words[code]
        return cells[used], used.nonzero()[:, 0]

    def read(self, z: ZTokens, begin: Tensor, lengths: Tensor, state: Tensor, data: Tensor) -> None:
        """Read stretches, the longest first, into the codes of ``z``, whose places are known.

        Args:
            begin, lengths: int64 ``[B]``, of the stretches; state: of their streams ``[B, 4]``; data: uint8, the bytes
                of all streams.
        """
        count, steps = len(begin), int(lengths[0])
        assert z.slot_offsets is not None
        once = torch.arange(count + 1, dtype=torch.int32)
        runtime = self.model.runtime
        with runtime.session("inferencer", self.marks(count), torch.zeros(count).long(), once, steps) as session:
            for step in range(steps):
                going = int((lengths > step).sum())
                rows = begin[:going] + step
                state = state[:going]
                self._read_rows(session.last[:going], z, rows, state, data)
                onward = rows[: int((lengths > step + 1).sum())]
                if len(onward):
                    own = one_each(z.codes[onward], z.unit_lengths[onward], z.slot_offsets[onward])
                    session.step(self.model.embed(own), torch.full_like(onward, step + 1))

    def _read_rows(self, hidden: Tensor, z: ZTokens, rows: Tensor, state: Tensor, data: Tensor) -> None:
        assert z.slot_offsets is not None
        own = one_each(z.codes[rows], z.unit_lengths[rows], z.slot_offsets[rows])
        gaps, used = _gaps(own), z.slot_offsets[rows] >= 0
        chosen = hidden.new_zeros(len(rows), self.words.shape[1])
        for slot in range(self.slots):
            going = used[:, slot].nonzero()[:, 0]
            before = self.after_gap(slot, chosen[going], gaps[going, slot])
            code, state[going] = decode_tokens(self.logits(hidden[going], slot, before), state[going], data)
            chosen[going] = before + self.words[code]
            z.codes[rows[going], slot] = code.int()


def _intervals(model: SlotModel, z: ZTokens) -> tuple[Layout, Tensor, Tensor]:
    """Of all symbols in the order of the streams: intervals int64 ``[R, 3]`` and the stream of each, int64 ``[R]``."""
    prior, layout = _Prior(model), Layout(model, z.cu_segments, z.cu_documents)
    found, streams = [], []
    for symbols, document, counts in layout.head(z):
        cu = offsets(document.bincount(minlength=len(z)))
        found.append(torch.stack(symbol_intervals(symbols, counts, cu, INCREMENT), 1))
        streams.append(layout.cu_stretches.long()[document])
    hidden = prior.hidden(z, layout)
    stretch = sequence_of_row(offsets(layout.lengths), z.ztokens)
    step = model.rows_at_once
    for at in range(0, z.ztokens, step):
        some = slice(at, at + step)
        assert z.slot_offsets is not None
        own = one_each(z.codes[some], z.unit_lengths[some], z.slot_offsets[some])
        intervals, rows = prior.intervals(hidden[some], own)
        found.append(intervals)
        streams.append(stretch[some][rows])
    stream = torch.cat(streams)
    order = stream.argsort(stable=True)
    return layout, torch.cat(found)[order], stream[order]


def _named(z: ZTokens) -> Tensor:
    """Tokens of each unit up to its last filled slot, int64 ``[K]``."""
    assert z.slot_offsets is not None
    return z.slot_offsets.long().amax(1) + 1


def _gaps(z: ZTokens) -> Tensor:
    """Tokens between each slot and the one before, int64 ``[K, L]``; anything where a slot is not filled."""
    assert z.slot_offsets is not None
    places = z.slot_offsets.long()
    gaps = places - torch.nn.functional.pad(places, (1, 0), value=-1)[:, :-1] - 1
    return gaps.clamp(min=0)


def _table(size: int, likely: int | None = None) -> Tensor:
    counts = torch.ones(size, dtype=torch.int64)
    if likely is not None:
        counts[likely] = LIKELY * size
    return counts
