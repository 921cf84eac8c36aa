"""Exact mode: what is stored beside the codes so that every token comes back.

Where the engine runs, that is the remainder (`ztok_fast.codec.remainder`). Without it no bits are the same everywhere
and tokens that the decompressor gets wrong are stored as they are: a stored token is written whatever the model says,
and the model goes on from it, so corrections count the mistakes given the true prefix, not those of a run that has lost
its way. A token whose logit leads by less than `MARGIN` is stored too: rounding that differs with the batch or the
machine could flip it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch

from ztok_fast.codec import remainder
from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.errors import ZBatchError
from ztok_fast.codec.passes import (
    BATCH_SEGMENTS,
    BATCH_TOKENS,
    Progress,
    Tokens,
    batches,
    decompress_documents,
    pack_tokens,
    teacher_forced,
)
from ztok_fast.codec.segment_model import SegmentModel
from ztok_fast.codec.varint import join_parts, split_parts
from ztok_fast.codec.ztokens import ZTokens

MARGIN = 0.01
"""Lead, in logits, that a right token needs to go without a correction."""

ROUNDS = 3
"""Decodes after which a section that still differs has all its tokens stored."""


@torch.inference_mode()  # with gradients the runtime would be the float one
def corrections_of(
    model: SegmentModel,
    z: ZTokens,
    sections: Sequence[Tokens],
    counts: Sequence[int],
    *,
    batch_tokens: int = BATCH_TOKENS,
    verify: bool = True,
    progress: Progress | None = None,
) -> list[Corrections | None]:
    """For every document what gives back its tokens; ``None`` where nothing does, which its reader must be told.

    Args:
        z: Z-tokens of the sections, on the CPU; sections: their true tokens; counts: sections of every document.
        batch_tokens: text tokens of one teacher-forced pass.
        verify: decode what was found and compare.
        progress: called with the number of tokens just verified, or encoded where that is all.
    """
    bounds = [0, *accumulate(counts)]
    documents = list(zip(bounds, bounds[1:]))
    if not model.runtime.exact:
        found = find_corrections(model, z, sections, batch_tokens=batch_tokens, verify=verify, progress=progress)
        lengths = [len(own) for own in sections]
        return [Corrections(*join(found[a:b], lengths[a:b])) for a, b in documents]
    streams = remainder.encode(model, z, sections, batch_tokens=batch_tokens, progress=None if verify else progress)
    wrong = [False] * len(sections)
    if verify:
        written = remainder.decode(model, z, streams, progress=progress)
        wrong = [list(own) != list(truth) for own, truth in zip(written, sections)]
    return [None if any(wrong[a:b]) else Corrections.of_remainder(join_parts(streams[a:b])) for a, b in documents]


@torch.inference_mode()
def decode(
    model: SegmentModel,
    z: ZTokens,
    stored: Sequence[Corrections | None],
    *,
    batch_segments: int = BATCH_SEGMENTS,
    progress: Progress | None = None,
) -> list[array]:
    """The text tokens of documents, none of those that are stored raw.

    Args:
        z: Z-tokens on the CPU; stored: what exact mode has stored of each document.

    Raises:
        ZBatchError: there is a remainder, and the engine does not run the model.
        ZFileError: a remainder does not hold a stream for each section.
    """
    remainders = [b"" if own is None else own.remainder or b"" for own in stored]
    coded = [i for i, own in enumerate(remainders) if own]
    guessed = [i for i, own in enumerate(stored) if not remainders[i] and (own is None or own.raw is None)]
    if coded and not model.runtime.exact:
        raise ZBatchError("precision: expected int8 or float32 beside a remainder, got float")
    found = [array("i") for _ in stored]
    for members in (coded, guessed):
        sections, counts = z.select(members).sections(model.config.section_segments)
        if members is coded:
            streams: list[bytes] = []
            for i, count in zip(members, counts):
                streams += split_parts(remainders[i], count)
            tokens = remainder.decode(model, sections, streams, batch_segments=batch_segments, progress=progress)
        else:
            lengths, forced, at = sections.cu_text[sections.cu_documents.long()].diff().tolist(), [], 0
            for i, count in zip(members, counts):
                forced += split(stored[i], lengths[at : at + count])
                at += count
            tokens = decompress_documents(model, sections, forced, batch_segments=batch_segments, progress=progress)
        written = iter(tokens)
        for i, count in zip(members, counts):
            for _ in range(count):
                found[i].extend(next(written))
    return found


def find_corrections(
    model: SegmentModel,
    z: ZTokens,
    documents: Sequence[Tokens],
    *,
    batch_tokens: int = BATCH_TOKENS,
    verify: bool = True,
    progress: Progress | None = None,
) -> list[dict[int, int]]:
    """For every section the tokens to store, position → token; equal sections are verified once.

    Args: as of `corrections_of`.
    """
    keys = [array("q", document).tobytes() for document in documents]
    first_use = {key: i for i, key in reversed(list(enumerate(keys)))}
    members = sorted(first_use.values())
    corrections: dict[int, dict[int, int]] = {}
    device = model.device
    for batch in batches([len(documents[i]) for i in members], batch_tokens):
        own = [members[b] for b in batch]
        truth = pack_tokens([documents[i] for i in own], device)
        predicted, margin, _ = teacher_forced(model, z.select(own).to(device), truth)
        wanted, at = ((predicted != truth) | (margin < MARGIN)).tolist(), 0
        for i in own:
            corrections[i] = {p: t for p, t in enumerate(documents[i]) if wanted[at + p]}
            at += len(documents[i])
    counted = sum(map(len, documents))
    if verify:
        _verify(model, z, documents, members, corrections, progress)
        counted -= sum(len(documents[i]) for i in members)
    if progress and counted:
        progress(counted)
    return [corrections[first_use[key]] for key in keys]


def _verify(model, z, documents, members, corrections, progress) -> None:
    """Decode the member documents with their corrections; add what still differs until nothing does."""
    pending = members
    for attempt in range(ROUNDS):
        written = decompress_documents(
            model,
            z.select(pending),
            [corrections[i] for i in pending],
            progress=progress if attempt == 0 else None,
        )
        failed = []
        for i, own in zip(pending, written):
            different = [p for p, (a, b) in enumerate(zip(own, documents[i])) if a != b]
            if different:
                corrections[i].update((p, documents[i][p]) for p in different)
                failed.append(i)
        if not failed:
            return
        pending = failed
    for i in pending:
        corrections[i] = dict(enumerate(documents[i]))


def join(corrections: list[dict[int, int]], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and tokens (int32) in a text whose sections have ``lengths`` tokens."""
    positions, tokens, before = [], [], 0
    for own, length in zip(corrections, lengths):
        for position in sorted(own):
            positions.append(before + position)
            tokens.append(own[position])
        before += length
    return torch.tensor(positions, dtype=torch.int32), torch.tensor(tokens, dtype=torch.int32)


def split(corrections: Corrections | None, lengths: list[int]) -> list[dict[int, int]]:
    """The inverse of `join`: a mapping for every section."""
    sections: list[dict[int, int]] = [{} for _ in lengths]
    if corrections is None or not lengths:
        return sections
    ends = torch.tensor(lengths).cumsum(0)
    positions = corrections.positions.long()
    owner = torch.searchsorted(ends, positions, right=True)
    start = torch.nn.functional.pad(ends[:-1], (1, 0))[owner]
    for section, position, token in zip(owner.tolist(), (positions - start).tolist(), corrections.tokens.tolist()):
        sections[section][position] = token
    return sections
