"""How long the units of slots are, as a stream says it: often nothing, since they end when their slots are full."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.emission import unit_lengths
from ztok_fast.codec.errors import ZFileError
from ztok_fast.codec.layout import offsets, sequence_of_row
from ztok_fast.codec.slot_coding import INCREMENT
from ztok_fast.codec.slots import fill_units, slot_mass
from ztok_fast.codec.ztokens import ZTokens
from ztok_fast.ops import halting_units

SHORTEST, COUNTED, LISTED = range(3)
"""What a stream says of a document's units: nothing, since they end when their slots are full; how many each segment
has, which `slot_mass` cuts; or how long each is."""

KINDS = 3

Read = Callable[[Tensor, Tensor, int], Tensor]
"""Reads one symbol for each of ``[R]`` documents: (document of each, counts of the table, increment)."""


def even(size: int) -> Tensor:
    """A table in which every symbol is as likely."""
    return torch.ones(size, dtype=torch.int64)


def units_told(z: ZTokens, written: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How the units of documents are told.

    Returns:
        int64 ``[n_documents]``, which of `SHORTEST` and so on; int64 ``[S]``, units of every segment; bool ``[K]``,
        units whose lengths are listed: all but the last of every segment.
    """
    counts, slots = z.cu_segments.diff().long(), z.num_codebooks
    kinds = torch.full((len(z),), LISTED)
    for kind, units in ((COUNTED, counts), (SHORTEST, None)):
        lengths, cu = _cut(written, z.cu_text, slots, units)
        for document, (first, last) in enumerate(zip(z.cu_documents.tolist(), z.cu_documents[1:].tolist())):
            mine, other = z.cu_segments[first : last + 1], cu[first : last + 1]
            if torch.equal(mine - mine[0], other - other[0]) and torch.equal(
                z.unit_lengths[int(mine[0]) : int(mine[-1])], lengths[int(other[0]) : int(other[-1])]
            ):
                kinds[document] = kind
    listed = (kinds == LISTED)[sequence_of_row(z.cu_documents, len(counts))][sequence_of_row(z.cu_segments, z.ztokens)]
    listed[z.cu_segments[1:].long() - 1] = False
    return kinds, counts, listed


def _cut(written: Tensor, cu_text: Tensor, slots: int, units: Tensor | None) -> tuple[Tensor, Tensor]:
    """Unit lengths int32 ``[K]`` and their offsets int32 ``[S + 1]`` as `slot_mass` cuts segments."""
    found = halting_units(slot_mass(written, cu_text, slots, units), cu_text)
    return unit_lengths(found, int(found.cu_units[-1])), found.cu_units


def read_units(
    config: ZTokConfig, named: Tensor, cu_text: Tensor, cu_documents: Tensor, kinds: Tensor, read: Read
) -> ZTokens:
    """The Z-tokens of text rows whose slots are known.

    Args:
        named: int64 ``[T]``, the tokens that slots name, -1 at others; cu_text: int32 ``[S + 1]``; cu_documents: int32
            ``[n_documents + 1]``.
        kinds: int64 ``[n_documents]``, `SHORTEST` and so on.

    Raises:
        ZFileError: what the streams say of units is none.
    """
    written, slots = named >= 0, config.num_codebooks
    document = sequence_of_row(cu_documents, len(cu_text) - 1)
    own = kinds[document]
    counts = torch.zeros(len(own), dtype=torch.int64)
    told = own != SHORTEST
    counts[told] = 1 + read(document[told], even(config.segment_length), INCREMENT)
    if bool((counts > cu_text.diff()).any()):
        raise ZFileError("units: expected no more than a segment has tokens, got more: the file is damaged")
    lengths, cu_units = _cut(written, cu_text, slots, torch.where(own == COUNTED, counts, 0))
    if bool((own == LISTED).any()):
        listed = read(
            document.repeat_interleave(torch.where(own == LISTED, counts - 1, 0)),
            even(config.max_unit_length),
            INCREMENT,
        )
        lengths, cu_units = _with_listed(lengths, cu_units, cu_text, own == LISTED, counts, listed + 1)
    unit = sequence_of_row(offsets(lengths), len(named))
    held = unit[written].bincount(minlength=len(lengths))
    if bool((cu_units.diff() != counts)[told].any()) or (len(held) and int(held.max()) > slots):
        raise ZFileError(f"units: expected at most {slots} written tokens in each, got others: the file is damaged")
    return fill_units(named.clamp(min=0), written, lengths, cu_units, cu_documents, slots)


def _with_listed(lengths, cu_units, cu_text, which, counts, listed) -> tuple[Tensor, Tensor]:
    """Unit lengths and offsets in which those of some segments are replaced by those that are listed."""
    sizes = torch.where(which, counts, cu_units.diff().long())
    cu = offsets(sizes)
    segment = sequence_of_row(cu, int(cu[-1]))
    replaced = torch.zeros(len(segment), dtype=torch.int32)
    replaced[~which[segment]] = lengths[~which[sequence_of_row(cu_units, len(lengths))]]
    last = torch.zeros(len(segment), dtype=torch.bool)
    last[cu[1:].long() - 1] = True
    replaced[which[segment] & ~last] = listed.int()
    rest = cu_text.diff().long().index_add_(0, segment, replaced.long(), alpha=-1)
    ends = which[segment] & last
    if bool((rest[which] < 1).any()):
        raise ZFileError("units: expected no more tokens than their segment has, got more: the file is damaged")
    replaced[ends] = rest[which].int()
    return replaced, cu
