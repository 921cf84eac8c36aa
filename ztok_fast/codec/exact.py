"""Exact mode: which tokens the decompressor gets wrong, stored beside the codes.

A stored token is written whatever the model says, and the model goes on from it, so corrections count the
mistakes given the true prefix, not those of a run that has lost its way. A token whose logit leads by less
than :data:`MARGIN` is stored too: rounding that differs with the batch or the machine cannot flip it.
"""

from __future__ import annotations

import torch

from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.model import ZTokModel
from ztok_fast.codec.passes import Progress, Window, decompress_windows, grouped, teacher_forced

MARGIN = 0.01
"""Lead, in logits, that a right token needs to go without a correction."""

ROUNDS = 3
"""Decodes after which a window that still differs has all its tokens stored."""


def find_corrections(
    model: ZTokModel,
    windows: list[Window],
    documents: list[list[int]],
    *,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> list[dict[int, int]]:
    """For every window the tokens to store, position → token; decoding with them is verified here.

    Args:
        documents: the true tokens of each window.
        batch_tokens: text tokens of one teacher-forced pass.
        progress: called with the number of tokens just verified; equal windows are verified once.
    """
    unique = {tuple(d): i for i, d in reversed(list(enumerate(documents)))}
    corrections: dict[tuple, dict[int, int]] = {}
    members = list(unique.items())
    for group in grouped([len(tokens) for tokens, _ in members], batch_tokens):
        batch = [members[i] for i in group]
        predicted, margin, _ = teacher_forced(model, [windows[i] for _, i in batch], [list(t) for t, _ in batch])
        truth = torch.tensor([t for tokens, _ in batch for t in tokens], device=predicted.device)
        wanted = ((predicted != truth) | (margin < MARGIN)).tolist()
        at = 0
        for tokens, _ in batch:
            corrections[tokens] = {p: t for p, t in enumerate(tokens) if wanted[at + p]}
            at += len(tokens)
    _verify(model, windows, members, corrections, progress)
    repeated = sum(map(len, documents)) - sum(len(tokens) for tokens, _ in members)
    if progress and repeated:
        progress(repeated)
    return [corrections[tuple(d)] for d in documents]


def _verify(model, windows, members, corrections, progress) -> None:
    """Decode every window with its corrections; add what still differs until nothing does."""
    pending = members
    for attempt in range(ROUNDS):
        written = decompress_windows(
            model,
            [windows[i] for _, i in pending],
            [corrections[t] for t, _ in pending],
            progress=progress if attempt == 0 else None,
        )
        failed = []
        for (tokens, index), own in zip(pending, written):
            different = [p for p, (a, b) in enumerate(zip(own, tokens)) if a != b]
            if different:
                corrections[tokens].update((p, tokens[p]) for p in different)
                failed.append((tokens, index))
        if not failed:
            return
        pending = failed
    for tokens, _ in pending:
        corrections[tokens] = dict(enumerate(tokens))


def join(corrections: list[dict[int, int]], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and tokens (int32) in a document whose windows have ``lengths`` tokens."""
    positions, tokens, before = [], [], 0
    for own, length in zip(corrections, lengths):
        for position in sorted(own):
            positions.append(before + position)
            tokens.append(own[position])
        before += length
    return torch.tensor(positions, dtype=torch.int32), torch.tensor(tokens, dtype=torch.int32)


def split(corrections: Corrections | None, lengths: list[int]) -> list[dict[int, int]]:
    """The inverse of :func:`join`: a mapping for every window."""
    windows: list[dict[int, int]] = [{} for _ in lengths]
    if corrections is None or not lengths:
        return windows
    ends = torch.tensor(lengths).cumsum(0)
    positions = corrections.positions.long()
    owner = torch.searchsorted(ends, positions, right=True)
    start = torch.nn.functional.pad(ends[:-1], (1, 0))[owner]
    for window, position, token in zip(owner.tolist(), (positions - start).tolist(), corrections.tokens.tolist()):
        windows[window][position] = token
    return windows


def document_corrections(positions, tokens, decoded: bytes, original: bytes) -> Corrections:
    """The smallest way to store a document's corrections; ``decoded`` are its true tokens as bytes."""
    return Corrections.smallest(positions, tokens, decoded, original)
