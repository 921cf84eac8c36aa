"""The slots of Z-tokens as range-coded streams, under the compressor's language model.

A document is one stream. It holds a symbol for every text token, *guessed* or the token that a slot names, as
`ztok_fast.codec.draft_head` says how likely each is; and, where they are not the shortest, how long units are. The
model runs in the engine, and the symbols' probabilities are sums in one fixed order, so that a reader has the counts of
the writer on any machine (docs/determinism.md).

The symbols of `ROWS` segments of a document take turns in its stream: first those of the segments' first tokens, then
those of their second ones, and so on. A reader finds the symbols of a turn side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ztok_fast.codec.draft import draft, draft_hidden, symbol_logits
from ztok_fast.codec.draft_head import SHARES, share_of
from ztok_fast.codec.errors import CodecError, ZFileError
from ztok_fast.codec.layout import expand_ranges, offsets, position_in_sequence, sequence_of_row, split_segments
from ztok_fast.codec.slot_coding import INCREMENT
from ztok_fast.codec.slot_model import SlotModel
from ztok_fast.codec.slot_units import KINDS, SHORTEST, even, read_units, units_told
from ztok_fast.codec.slots import written_tokens
from ztok_fast.codec.turns import decode_in_turns
from ztok_fast.codec.ztokens import ZTokens
from ztok_fast.ops import decode_symbols, range_decoder, range_encode, symbol_intervals, token_intervals
from ztok_fast.ops.entropy.range_encode import Streams

ROWS = 128
"""Segments whose symbols take turns in a stream, and that are read side by side."""

_FIRST = 2 * SHARES * KINDS
"""Values of a stream's first symbol: whether segments have other lengths than usual, the share, and what is said of
the units."""


@torch.inference_mode()
def encode(model: SlotModel, z: ZTokens) -> list[bytes]:
    """What stores the Z-tokens of each document; `decode` is the inverse.

    Raises:
        CodecError: the engine does not run the model.
    """
    symbols = _symbols(model, z.to("cpu"))
    start, size, total = symbols.intervals.T.contiguous()
    return range_encode(start, size, total, offsets(symbols.document.bincount(minlength=len(z)))).to_bytes()


@torch.inference_mode()
def decode(model: SlotModel, streams: Sequence[bytes], tokens: Sequence[int]) -> ZTokens:
    """The Z-tokens of documents.

    Args:
        streams: of each document what `encode` gave, of this call or of several; tokens: its text tokens.

    Raises:
        CodecError: the engine does not run the model.
        ZFileError: a document's bytes do not hold such Z-tokens.
    """
    _check(model)
    reader = _Reader(model, streams)
    first = reader.symbols(torch.arange(len(streams)), even(_FIRST))
    cuts, counts = split_segments(list(tokens), model.config.segment_length)
    for document in (first >= KINDS * SHARES).nonzero()[:, 0].tolist():
        own = reader.cuts(document, tokens[document])
        at = sum(counts[:document])
        cuts[at : at + counts[document]], counts[document] = own, len(own)
    cu_text, cu_documents = offsets(torch.tensor(cuts, dtype=torch.int64)), offsets(torch.tensor(counts))
    named = reader.text(cu_text, cu_documents, first // KINDS % SHARES)
    return reader.units(named, cu_text, cu_documents, first % KINDS)


def _check(model: SlotModel) -> None:
    if not model.runtime.exact:
        raise CodecError(
            "slots under the compressor's model: expected a codec whose base model the engine runs (int8 or float32), "
            "since a reader must find the same bits; got transformers' modules (float)"
        )


@dataclass
class _Symbols:
    """The symbols of documents, in the order of their streams: intervals int64 ``[R, 3]``, documents int64 ``[R]``."""

    intervals: Tensor
    document: Tensor


def _symbols(model: SlotModel, z: ZTokens) -> _Symbols:
    _check(model)
    cu_text, named = z.cu_text, written_tokens(z)
    of_segment = sequence_of_row(z.cu_documents, len(cu_text) - 1)
    document = of_segment[sequence_of_row(cu_text, len(named))]
    share = share_of(named >= 0, document, len(z))
    found, owners = [], []

    def add(symbols: Tensor, owner: Tensor, counts: Tensor, increment: int = 0) -> None:
        cu = offsets(owner.bincount(minlength=len(z)))
        found.append(torch.stack(symbol_intervals(symbols, counts, cu, increment), 1))
        owners.append(owner)

    lengths = cu_text.diff().long()
    regular = _regular(model, lengths, z)
    units, counts, listed = units_told(z, named >= 0)
    own = torch.arange(len(z))
    add((~regular * SHARES + share) * KINDS + units, own, even(_FIRST))
    irregular = ~regular[of_segment]
    add(lengths[irregular] - 1, of_segment[irregular], even(model.config.segment_length))
    order = _turns(cu_text, z.cu_documents)
    found.append(_text(model, named, cu_text, share[of_segment])[order])
    owners.append(document[order])
    told = units[of_segment] != SHORTEST
    add(counts[told] - 1, of_segment[told], even(model.config.segment_length), INCREMENT)
    row_document = of_segment[sequence_of_row(z.cu_segments, z.ztokens)]
    add(z.unit_lengths.long()[listed] - 1, row_document[listed], even(model.config.max_unit_length), INCREMENT)
    owner = torch.cat(owners)
    by_document = owner.argsort(stable=True)
    return _Symbols(torch.cat(found)[by_document], owner[by_document])


def _regular(model: SlotModel, lengths: Tensor, z: ZTokens) -> Tensor:
    """Whether each document is cut into full segments and what is left, bool ``[n_documents]``."""
    cu, bounds = offsets(lengths).tolist(), z.cu_documents.tolist()
    whole = [cu[last] - cu[first] for first, last in zip(bounds, bounds[1:])]
    cuts, counts = split_segments(whole, model.config.segment_length)
    at, regular, own = 0, [], lengths.tolist()
    for count, first, last in zip(counts, bounds, bounds[1:]):
        regular.append(cuts[at : at + count] == own[first:last])
        at += count
    return torch.tensor(regular, dtype=torch.bool)


def _turns(cu_text: Tensor, cu_documents: Tensor) -> Tensor:
    """The text rows in the order of their documents' streams, int64 ``[T]``."""
    total = int(cu_text[-1])
    segment, position = sequence_of_row(cu_text, total), position_in_sequence(cu_text, total)
    block, rank = _blocks(cu_text, cu_documents)
    order = rank[segment].argsort(stable=True)
    order = order[position[order].argsort(stable=True)]
    return order[block[segment[order]].argsort(stable=True)]


def _blocks(cu_text: Tensor, cu_documents: Tensor) -> tuple[Tensor, Tensor]:
    """Of every segment the block, counted over all documents, and its place there by falling length: int64 ``[S]``."""
    count = len(cu_text) - 1
    place = position_in_sequence(cu_documents, count)
    owner, blocks = sequence_of_row(cu_documents, count), -(-cu_documents.diff().long() // ROWS)
    block = offsets(blocks).long()[owner] + place // ROWS
    order = cu_text.diff().argsort(descending=True, stable=True)
    order = order[block[order].argsort(stable=True)]
    rank = torch.empty_like(order)
    rank[order] = position_in_sequence(offsets(block.bincount()), count)
    return block, rank


def _text(model: SlotModel, named: Tensor, cu_text: Tensor, share: Tensor) -> Tensor:
    """The intervals int64 ``[T, 3]`` of the symbols of text rows; ``share``: int64 ``[S]``."""
    found = [torch.empty(0, 3, dtype=torch.int64)]
    for first in range(0, len(cu_text) - 1, ROWS):
        cu = cu_text[first : first + ROWS + 1]
        own, shares = named[int(cu[0]) : int(cu[-1])], share[first : first + ROWS]
        hidden = draft_hidden(model, draft(model, own, cu - cu[0], shares), own >= 0, cu - cu[0], shares)
        for rows, symbols in zip(hidden.split(model.rows_at_once), own.split(model.rows_at_once)):
            logits, _ = symbol_logits(model, rows)
            symbols = torch.where(symbols >= 0, symbols, logits.shape[1] - 1)
            found.append(torch.stack(token_intervals(logits, symbols), 1))
    return torch.cat(found)


class _Reader:
    """Reads the streams of documents."""

    def __init__(self, model: SlotModel, streams: Sequence[bytes]) -> None:
        self.model = model
        self.data, cu_bytes = Streams.from_bytes(streams)
        self.state = range_decoder(self.data, cu_bytes)

    def symbols(self, document: Tensor, counts: Tensor, increment: int = 0) -> Tensor:
        """One symbol for each of ``document``, int64 ``[R]`` in rising order."""
        cu = offsets(document.bincount(minlength=len(self.state)))
        found, self.state = decode_symbols(counts, self.state, self.data, cu, len(document), increment)
        return found

    def cuts(self, document: int, tokens: int) -> list[int]:
        """The lengths of a document's segments where they are not the usual ones."""
        lengths: list[int] = []
        while sum(lengths) < tokens:
            lengths.append(1 + int(self.symbols(torch.tensor([document]), even(self.model.config.segment_length))))
        if sum(lengths) > tokens:
            raise ZFileError(f"document {document}: expected segments of {tokens} tokens, got more: it is damaged")
        return lengths

    def text(self, cu_text: Tensor, cu_documents: Tensor, share: Tensor) -> Tensor:
        """The tokens that are named, int64 ``[T]``, -1 at others; ``share``: int64 ``[n_documents]``."""
        named = torch.full((int(cu_text[-1]),), -1)
        for segments in _batches(cu_text, cu_documents):
            rows, cu = expand_ranges(cu_text[segments], cu_text[segments + 1])
            document = torch.searchsorted(cu_documents[1:].contiguous(), segments, right=True)
            named[rows] = self._segments(cu.diff().long(), document, share[document])
        return named

    def _segments(self, lengths: Tensor, document: Tensor, share: Tensor) -> Tensor:
        """The tokens that are named in segments of falling length, packed."""
        model, count, longest = self.model, len(lengths), int(lengths[0])
        found = torch.full((count, longest), -1)
        session = model.runtime.session(
            "compressor",
            model.draft.starts(share).float(),
            torch.zeros(count, dtype=torch.int64),
            torch.arange(count + 1, dtype=torch.int32),
            longest,
        )
        with session as rows:
            for column in range(longest):
                going = int((lengths > column).sum())
                logits, guesses = symbol_logits(model, rows.last[:going])
                symbols = decode_in_turns(logits, document[:going], self.state, self.data)
                written = symbols < logits.shape[1] - 1
                found[:going, column] = torch.where(written, symbols, -1)
                onward = int((lengths > column + 1).sum())
                if onward:
                    token = torch.where(written, symbols, guesses)[:onward]
                    told = model.draft.told(written[:onward], share[:onward])
                    rows.step(model.adapted.embedding(token) + told, torch.full_like(token, column + 1))
        return found[torch.arange(longest) < lengths[:, None]]

    def units(self, named: Tensor, cu_text: Tensor, cu_documents: Tensor, kinds: Tensor) -> ZTokens:
        """The Z-tokens of text rows whose slots are known; ``kinds``: int64 ``[n_documents]``, `SHORTEST` and so on.

        Raises:
            ZFileError: what the streams say of units is none.
        """
        return read_units(self.model.config, named, cu_text, cu_documents, kinds, self.symbols)


def _batches(cu_text: Tensor, cu_documents: Tensor) -> Iterator[Tensor]:
    """Segments that are read side by side, by falling length: int64; those of a block together, blocks in order."""
    block, _ = _blocks(cu_text, cu_documents)
    sizes = block.bincount().tolist()
    owner = sequence_of_row(cu_documents, len(block))
    last: dict[int, int] = {}
    batches: list[list[int]] = []
    held: list[int] = []
    for number, document in enumerate(owner[offsets(torch.tensor(sizes)).long()[:-1]].tolist()):
        # After the blocks before it in the same stream, and where there is room.
        at = last.get(document, -1) + 1
        while at < len(batches) and held[at] + sizes[number] > ROWS:
            at += 1
        if at == len(batches):
            batches.append([])
            held.append(0)
        batches[at].append(number)
        held[at] += sizes[number]
        last[document] = at
    lengths = cu_text.diff().long()
    for own in batches:
        segments = torch.isin(block, torch.tensor(own)).nonzero()[:, 0]
        yield segments[lengths[segments].argsort(descending=True, stable=True)]
