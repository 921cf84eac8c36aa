"""Exact mode's remainder: the tokens that Z-tokens do not write, range-coded under the decompressor.

The decompressor knows how likely each token is, given the Z-tokens and the text before. A token costs -log2 of that,
which is next to nothing where it would be guessed anyway. The engine's passes have the bits of its steps, so encoding
is one packed pass over the true text, and decoding sees the same counts on any machine (docs/determinism.md).

A section has one stream. First, for each segment, whether a guess in it is wrong: where none is, the likeliest tokens
are the text, and nothing more is stored. Then come the tokens of the other segments in *turns*, so that the segments
decode side by side: turn 0 has the tokens that begin a segment, every later turn the next token to guess of each.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ztok_fast.codec.layout import offsets, position_in_sequence, sequence_of_row
from ztok_fast.codec.passes import (
    BATCH_SEGMENTS,
    BATCH_TOKENS,
    Progress,
    Tokens,
    batches,
    decode_segments,
    equal_once,
    pack_tokens,
)
from ztok_fast.codec.segment_model import SegmentModel
from ztok_fast.codec.slot_coding import INCREMENT
from ztok_fast.codec.turns import decode_in_turns
from ztok_fast.codec.ztokens import ZTokens
from ztok_fast.ops import (
    decode_symbols,
    range_decoder,
    range_encode,
    symbol_intervals,
    token_intervals,
)
from ztok_fast.ops.entropy.range_encode import Streams

RIGHT, WRONG = 0, 1
"""What a section's stream begins with, for each segment; it learns how often each comes."""


@torch.inference_mode()
def encode(
    model: SegmentModel,
    z: ZTokens,
    documents: Sequence[Tokens],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> list[bytes]:
    """The stream of every document; `decode` is the inverse. The engine must run the model.

    Args:
        z: Z-tokens of documents of at most one section each, on the CPU; documents: their true tokens.
        batch_tokens: text tokens of one pass; progress: called with the number of tokens just encoded.
    """
    keys = [(*key, array("q", own).tobytes()) for key, own in zip(z.keys(), documents)]
    uses, unique = equal_once(keys)
    found: dict[tuple, bytes] = {}
    for batch in batches([len(documents[i]) for i in unique], batch_tokens):
        members = [unique[i] for i in batch]
        truth = pack_tokens([documents[i] for i in members], "cpu")
        for i, stream in zip(members, _encode(model, z.select(members), truth)):
            found[keys[i]] = stream
            if progress:
                progress(len(documents[i]) * uses[keys[i]])
    return [found[key] for key in keys]


@torch.inference_mode()
def decode(
    model: SegmentModel,
    z: ZTokens,
    streams: Sequence[bytes],
    *,
    batch_segments: int = BATCH_SEGMENTS,
    progress: Progress | None = None,
) -> list[array]:
    """The text tokens of documents of at most one section each, on the CPU; equal ones share one array.

    Streams that are damaged give some other tokens: whoever keeps a hash of the text compares it.

    Args:
        batch_segments: segments that are decoded side by side, but no fewer than one document has.
    """
    keys = [(*key, stream) for key, stream in zip(z.keys(), streams)]
    uses, unique = equal_once(keys)
    counts = z.cu_documents.diff().tolist()
    found: dict[tuple, array] = {}
    for batch in batches([counts[i] for i in unique], batch_segments):
        members = [unique[i] for i in batch]
        own = z.select(members)
        reader = _Reader(model, own, [streams[i] for i in members])
        written = decode_segments(model, own, batch_segments=max(1, len(reader.section)), choose=reader.choose)
        bounds = own.cu_documents.tolist()
        for i, first, last in zip(members, bounds, bounds[1:]):
            found[keys[i]] = array("i", [t for segment in written[first:last] for t in segment])
            if progress:
                progress(len(found[keys[i]]) * uses[keys[i]])
    return [found[key] for key in keys]


def _encode(model: SegmentModel, z: ZTokens, truth: Tensor) -> list[bytes]:
    inputs = model.decoder_inputs(model.embed(z), z, truth, z.cu_text)
    hidden, named = model.decompressor_hidden(inputs), model.written(z)
    guessed = torch.arange(len(truth)) if named is None else (named < 0).nonzero()[:, 0]
    truth, hidden = truth[guessed], hidden[guessed]
    right, intervals = [torch.zeros(0, dtype=torch.bool)], [torch.zeros(0, 3, dtype=torch.int64)]
    for rows, own in zip(hidden.split(model.rows_at_once), truth.split(model.rows_at_once)):
        logits = model.runtime.logits(rows).float()
        right.append(logits.argmax(-1) == own)
        intervals.append(torch.stack(token_intervals(logits, own), 1))
    segments = len(z.cu_segments) - 1
    section = sequence_of_row(z.cu_documents, segments)
    segment = sequence_of_row(z.cu_text, int(z.cu_text[-1]))[guessed]
    wrong = torch.zeros(segments, dtype=torch.int64)
    wrong[segment[~torch.cat(right)]] = WRONG
    flags = torch.stack(symbol_intervals(wrong, _flag_counts(), z.cu_documents, INCREMENT), 1)
    coded = (wrong[segment] == WRONG).nonzero()[:, 0]
    coded = coded[_turns(guessed, segment, z.cu_text)[coded].argsort(stable=True)]
    owner = torch.cat([section, section[segment[coded]]])
    symbols = torch.cat([flags, torch.cat(intervals)[coded]])[owner.argsort(stable=True)]
    start, size, total = symbols.T.contiguous()
    return range_encode(start, size, total, offsets(owner.bincount(minlength=len(z)))).to_bytes()


def _turns(guessed: Tensor, segment: Tensor, cu_text: Tensor) -> Tensor:
    """The turn of every token to guess, int64 ``[R]``.

    Args:
        guessed: int64 ``[R]``, their rows in the text; segment: int64 ``[R]``, the segment of each.
    """
    rank = position_in_sequence(offsets(segment.bincount(minlength=len(cu_text) - 1)), len(guessed))
    begins = torch.zeros(len(cu_text) - 1, dtype=torch.int64)
    begins[segment[guessed == cu_text.long()[segment]]] = 1
    return rank + 1 - begins[segment]


class _Reader:
    """Chooses the tokens of segments as their sections' streams say.

    Attributes:
        section: int64 ``[S]``, the section of every segment.
    """

    def __init__(self, model: SegmentModel, z: ZTokens, streams: Sequence[bytes]) -> None:
        self._runtime = model.runtime
        self._data, cu_bytes = Streams.from_bytes(streams)
        count = len(z.cu_segments) - 1
        self.section = sequence_of_row(z.cu_documents, count)
        state = range_decoder(self._data, cu_bytes)
        flags, self._state = decode_symbols(_flag_counts(), state, self._data, z.cu_documents, count, INCREMENT)
        self._wrong = flags == WRONG

    def choose(self, hidden: Tensor, bias: Tensor | None, segments: Tensor) -> Tensor:
        tokens = torch.empty_like(segments)
        wrong = self._wrong[segments]
        guessed = (~wrong).nonzero()[:, 0]
        if len(guessed):
            tokens[guessed] = self._runtime.argmax(hidden[guessed], None if bias is None else bias[guessed])
        coded = wrong.nonzero()[:, 0]
        if len(coded):
            # The segments of a stream take turns in their order.
            coded = coded[segments[coded].argsort()]
            rows = self._runtime.logits(hidden[coded], None if bias is None else bias[coded]).float()
            tokens[coded] = decode_in_turns(rows, self.section[segments[coded]], self._state, self._data)
        return tokens


def _flag_counts() -> Tensor:
    return torch.ones(2, dtype=torch.int64)
