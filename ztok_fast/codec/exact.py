"""Exact mode: which tokens the decompressor gets wrong, stored beside the codes.

A stored token is written whatever the model says, and the model goes on from it, so corrections count the
mistakes given the true prefix, not those of a run that has lost its way. A token whose logit leads by less
than `MARGIN` is stored too, unless the engine runs: rounding that differs with the batch or the machine cannot flip it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.passes import (
    BATCH_TOKENS,
    Progress,
    Tokens,
    batches,
    decompress_documents,
    pack_tokens,
    teacher_forced,
)
from ztok_fast.codec.segment_model import SegmentModel
from ztok_fast.codec.ztokens import ZTokens

MARGIN = 0.01
"""Lead, in logits, that a right token needs to go without a correction."""

ROUNDS = 3
"""Decodes after which a section that still differs has all its tokens stored."""


@torch.inference_mode()  # with gradients the runtime would be the float one, which needs a margin
def find_corrections(
    model: SegmentModel,
    z: ZTokens,
    documents: Sequence[Tokens],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> list[dict[int, int]]:
    """For every document the tokens to store, position → token; decoding with them is verified here.

    Args:
        z: Z-tokens of documents of at most one section each, on the CPU; documents: their true tokens.
        batch_tokens: text tokens of one teacher-forced pass.
        progress: called with the number of tokens just verified; equal documents are verified once.
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
        wanted = (predicted != truth) | (margin < MARGIN if not model.runtime.exact else False)
        wanted, at = wanted.tolist(), 0
        for i in own:
            corrections[i] = {p: t for p, t in enumerate(documents[i]) if wanted[at + p]}
            at += len(documents[i])
    _verify(model, z, documents, members, corrections, progress)
    repeated = sum(map(len, documents)) - sum(len(documents[i]) for i in members)
    if progress and repeated:
        progress(repeated)
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


def by_document(
    corrections: list[dict[int, int]], lengths: list[int], counts: Sequence[int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`join` for every document, given the corrections and lengths of all sections and how many each document has."""
    found, at = [], 0
    for count in counts:
        found.append(join(corrections[at : at + count], lengths[at : at + count]))
        at += count
    return found


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


def document_corrections(positions, tokens, decoded: bytes, original: bytes) -> Corrections:
    """The smallest way to store a document's corrections; ``decoded`` are its true tokens as bytes."""
    return Corrections.smallest(positions, tokens, decoded, original)
