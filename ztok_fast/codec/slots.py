"""Z-tokens of slots: units that end when their slots are full, and what the decompressor knows of the slots ahead.

A slot names one text token that must be written; the decompressor guesses the others. The halting mass is 1/L for a
written token and 0 for one that is guessed, so dense text gets short units and predictable text long ones.
"""

from __future__ import annotations

import torch

from ztok_fast.codec.emission import MASS_STEP, unit_lengths
from ztok_fast.codec.layout import offsets, position_in_sequence, sequence_of_row
from ztok_fast.codec.ztokens import ZTokens
from ztok_fast.ops import halting_units


def slot_mass(
    written: torch.Tensor, cu_segments: torch.Tensor, slots: int, units: torch.Tensor | None = None
) -> torch.Tensor:
    """The halting mass ``[T]`` of units with ``slots`` slots, given which tokens are written, bool ``[T]``.

    The mass of a segment's last written token lies on its last token, so that the tokens after it end its unit.

    Args:
        units: int64 ``[S]``, units to cut every segment into, where that leaves no unit more than its slots;
            ``None`` for as few as there can be.
    """
    segment, count = sequence_of_row(cu_segments, len(written)), len(cu_segments) - 1
    share = torch.full((count,), 1.0 / slots, dtype=torch.float64, device=written.device)
    rest = torch.zeros_like(share)
    if units is not None:
        lengths = cu_segments.diff().long()
        held = torch.zeros_like(lengths).index_add_(0, segment, written.long())
        share = torch.maximum(share, units.double() / held.clamp(min=1)).clamp(max=1.0)
        rest = ((units - held).double() / (lengths - held).clamp(min=1)).clamp(0.0, 1.0)
    # Rounded up to the grid of the op, so that as many equal summands as must reach the threshold do.
    share, rest = ((x / MASS_STEP).ceil() * MASS_STEP for x in (share, rest))
    mass = torch.where(written, share[segment], rest[segment])
    rows = torch.arange(len(written), device=written.device)
    last = torch.full((count,), -1, dtype=torch.int64, device=written.device)
    last = last.scatter_reduce(0, segment, torch.where(written, rows, -1), "amax")
    owners = last >= 0
    mass[last[owners]] = rest[owners]
    mass[cu_segments[1:].long()[owners] - 1] = share[owners]
    return mass.float()


def fill_slots(
    tokens: torch.Tensor,
    written: torch.Tensor,
    cu_segments: torch.Tensor,
    cu_documents: torch.Tensor,
    slots: int,
    mass: torch.Tensor | None = None,
) -> ZTokens:
    """The Z-tokens of packed segments, given which tokens are written.

    Args:
        tokens: int64 ``[T]``; written bool ``[T]``; cu_segments int32 ``[S + 1]``; cu_documents int32 ``[G + 1]``.
        slots: most written tokens of one unit.
        mass: halting mass ``[T]`` to cut units by; ``None`` for units that end when their slots are full. No unit
            may hold more written tokens than it has slots.
    """
    if mass is None:
        mass = slot_mass(written, cu_segments, slots)
    units = halting_units(mass, cu_segments)
    lengths = unit_lengths(units, int(units.cu_units[-1]))
    return fill_units(tokens, written, lengths, units.cu_units, cu_documents, slots)


def fill_units(tokens, written, lengths, cu_units, cu_documents, slots: int) -> ZTokens:
    """The Z-tokens of units of ``lengths`` (int32 ``[K]``) tokens; ``cu_units``: int32 ``[S + 1]``, of every segment.

    The other arguments are those of `fill_slots`.
    """
    cu_text = offsets(lengths)
    unit = sequence_of_row(cu_text, len(tokens))[written]
    offset = position_in_sequence(cu_text, len(tokens))[written]
    before = offsets(written.long())[cu_text.long()[:-1]].long()
    place = torch.arange(len(unit), device=tokens.device) - before[unit]
    codes = torch.full((len(lengths), slots), -1, dtype=torch.int32, device=tokens.device)
    at = codes.clone()
    codes[unit, place] = tokens[written].int()
    at[unit, place] = offset.int()
    return ZTokens(codes, lengths, cu_units, cu_documents, at)


def written_tokens(z: ZTokens) -> torch.Tensor:
    """The tokens that the slots name, int64 ``[T]``; -1 where the decompressor guesses."""
    assert z.slot_offsets is not None
    filled = z.codes >= 0
    start = offsets(z.unit_lengths)
    named = torch.full((int(start[-1]),), -1, dtype=torch.int64, device=z.codes.device)
    rows = start.long()[:-1, None] + z.slot_offsets
    named[rows[filled]] = z.codes[filled].long()
    return named


def slot_stream(z: ZTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The slots of documents one after another, without the bounds of units and segments.

    Returns:
        Their tokens int64 ``[S]``; their gaps int64 ``[S]``, guessed tokens between a slot and the one before (or the
        start of its document); and int32 ``[n_documents + 1]``, slots of every document.
    """
    named = written_tokens(z)
    places = (named >= 0).nonzero()[:, 0]
    cu_text = z.cu_text[z.cu_documents.long()]
    cu_slots = torch.searchsorted(places, cu_text.long()).int()
    before = torch.roll(places, 1)
    first = cu_slots[:-1][cu_slots.diff() > 0].long()
    before[first] = cu_text[:-1][cu_slots.diff() > 0].long() - 1
    return named[places], places - before - 1, cu_slots


def ahead(written: torch.Tensor, cu_segments: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The next written tokens after every text row of its segment.

    Args:
        written: bool ``[T]``; count: how many.

    Returns:
        Indices int64 ``[T, count]`` among the written tokens, and how many tokens ahead each is, int64 ``[T, count]``,
        0 where the segment has no more of them.
    """
    total, device = len(written), written.device
    if not total:
        nothing = torch.zeros(0, count, dtype=torch.int64, device=device)
        return nothing, nothing
    passed = written.long().cumsum(0)
    of_segment = torch.nn.functional.pad(passed, (1, 0))[cu_segments[1:].long()]
    limit = of_segment[sequence_of_row(cu_segments, total)]
    index = passed[:, None] + torch.arange(count, device=device)
    known = index < limit[:, None]
    places = torch.cat([written.nonzero()[:, 0], passed.new_zeros(1)])
    index = torch.where(known, index, len(places) - 1)
    distance = places[index] - torch.arange(total, device=device)[:, None]
    return index, torch.where(known, distance, 0)
