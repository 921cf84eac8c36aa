"""Which tokens of a text are written into slots: those that the decompressor would not guess."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ztok_fast.codec.emission import fixed_mass, unit_lengths
from ztok_fast.codec.focus import KEPT
from ztok_fast.codec.layout import expand_ranges, offsets, position_in_sequence, sequence_of_row
from ztok_fast.codec.slot_model import SlotModel
from ztok_fast.codec.slots import ahead, fill_slots, slot_mass
from ztok_fast.codec.ztokens import ZTokens
from ztok_fast.ops import halting_units

MARGIN = 0.01
"""Lead, in logits, that a right guess needs where a row's bits depend on its batch."""

ROUNDS = 16
"""Passes after which a segment that still has wrong guesses gets all its tokens written."""

PRUNINGS = 1
"""How often tokens are taken out again that the others make needless."""

TURNS = 4
"""Passes that find them; each leaves out every fourth written token."""

CASCADE = 0.4
"""Share of the guesses right after a wrong one that go wrong with it."""

HARM = 2.0
"""Nats of surprise that a wrong token weighs as much as: the first saves bits, the second accuracy."""


@dataclass
class Guesses:
    """What the decompressor would write at every text row, given the true text before it.

    Attributes:
        tokens: int64 ``[T]``; right: bool ``[T]``, the guess is the text's token, and surely so.
        loss: fp32 ``[T]``, −ln p of the text's token.
    """

    tokens: torch.Tensor
    right: torch.Tensor
    loss: torch.Tensor


@torch.no_grad()
def guess(model: SlotModel, tokens, written, cu_segments, prefix=None, mass=None) -> Guesses:
    """The guesses of packed segments when the tokens of ``written`` (bool ``[T]``) are told.

    Args:
        prefix: int64 ``[T]``, tokens to read in place of the text's before each row; mass: as in `fill_slots`.
    """
    # What is told needs no guess.
    guessed = ~written
    hidden, own = _hidden(model, tokens, written, cu_segments, prefix, mass)[guessed], tokens[guessed]
    guesses = Guesses(tokens.clone(), written.clone(), torch.zeros(len(tokens), device=tokens.device))
    found, right, loss = [own[:0]], [written[:0]], [guesses.loss[:0]]
    for rows, truth in zip(hidden.split(model.rows_at_once), own.split(model.rows_at_once)):
        logits = model.runtime.logits(rows).float()
        found.append(logits.argmax(-1))
        right.append(found[-1] == truth)
        if not model.runtime.exact:
            best = logits.topk(2, dim=-1).values
            right[-1] &= best[:, 0] - best[:, 1] >= MARGIN
        loss.append(torch.nn.functional.cross_entropy(logits, truth, reduction="none"))
    guesses.tokens[guessed], guesses.right[guessed] = torch.cat(found), torch.cat(right)
    guesses.loss[guessed] = torch.cat(loss)
    return guesses


@torch.no_grad()
def is_right(model: SlotModel, tokens, written, cu_segments, mass=None) -> torch.Tensor:
    """Whether each token is told or guessed right, bool ``[T]``: `Guesses.right` alone, which takes less time."""
    if not model.runtime.exact:
        return guess(model, tokens, written, cu_segments, mass=mass).right
    hidden, right = _hidden(model, tokens, written, cu_segments, None, mass), written.clone()
    right[~written] = model.runtime.argmax(hidden[~written]) == tokens[~written]
    return right


def _hidden(model: SlotModel, tokens, written, cu_segments, prefix, mass) -> torch.Tensor:
    """The hidden states ``[T, D]`` that the guesses are made from."""
    segments = torch.tensor([0, len(cu_segments) - 1], dtype=torch.int32, device=tokens.device)
    z = fill_slots(tokens, written, cu_segments, segments, model.config.num_codebooks, mass)
    inputs = model.decoder_inputs(model.embed(z), z, tokens if prefix is None else prefix, cu_segments)
    return model.decompressor_hidden(inputs)


def grow(model: SlotModel, tokens, cu_segments, written: torch.Tensor, cut=None, limit=None) -> torch.Tensor:
    """Write more tokens, pass by pass, until no guess is wrong.

    What is written changes the guesses before it, so one pass is seldom enough. The set only grows, so it ends. A
    segment without a wrong guess is done, and only the others are looked at again.

    Args:
        cut: gives the halting mass for what is written in the segments whose indices it is given, as
            ``cut(written, cu_segments, segments)``; ``None`` for units that end when their slots are full.
        limit: ``[S]``, segments that reach so many written tokens are left as they are then: nobody needs them.
    """
    written = written.clone()
    segment = sequence_of_row(cu_segments, len(tokens))
    open_segments = torch.arange(len(cu_segments) - 1, device=tokens.device)
    if limit is not None:
        open_segments = open_segments[sums(written, segment, len(open_segments)) < limit]
    for left in range(ROUNDS, -1, -1):
        if not len(open_segments):
            break
        rows, cu = expand_ranges(cu_segments[open_segments], cu_segments[open_segments + 1])
        own = written[rows]
        mass = None if cut is None else cut(own, cu, open_segments)
        wrong = ~is_right(model, tokens[rows], own, cu, mass)
        if not left:
            wrong |= True
        written[rows] = own | wrong
        owner, count = sequence_of_row(cu, len(rows)), len(open_segments)
        unfinished = sums(wrong, owner, count) > 0
        if limit is not None:
            unfinished &= sums(own | wrong, owner, count) < limit[open_segments]
        open_segments = open_segments[unfinished]
    return written


def close(
    model: SlotModel, tokens, cu_segments, keep: torch.Tensor | None = None, prunings: int = PRUNINGS
) -> tuple[torch.Tensor, torch.Tensor]:
    """The closed loop: tokens to write, bool ``[T]``, so that all others are guessed right, and their losses.

    It starts from what is guessed wrong when every other token is told, and grows. Then it looks which written tokens
    would be guessed right if they were not told, takes them out, and grows again: a segment keeps the smaller set.

    Args:
        keep: bool ``[T]``, tokens that are written in any case; prunings: how often tokens are taken out.

    Returns:
        The tokens to write, and fp32 ``[T]``, −ln p of every token when it is not told and most others are.
    """
    keep = torch.zeros_like(tokens, dtype=torch.bool) if keep is None else keep
    # Counted in each segment, so that what is written does not depend on the other segments of the batch.
    segment, count = sequence_of_row(cu_segments, len(tokens)), len(cu_segments) - 1
    even = position_in_sequence(cu_segments, len(tokens)) % 2 == 0
    of_odd, of_even = (guess(model, tokens, told, cu_segments) for told in (even, ~even))
    loss = torch.where(even, of_even.loss, of_odd.loss)
    written = grow(model, tokens, cu_segments, ~torch.where(even, of_even.right, of_odd.right) | keep)
    for _ in range(prunings):
        needless = torch.zeros_like(written)
        passed = torch.nn.functional.pad(written.long().cumsum(0), (1, 0))
        turn = (passed[1:] - passed[cu_segments.long()][segment]) % TURNS
        for part in range(TURNS):
            untold = written & (turn == part)
            found = guess(model, tokens, written & ~untold, cu_segments)
            needless |= untold & found.right
            loss = torch.where(untold, found.loss, loss)
        held = sums(written, segment, count)
        trial = grow(model, tokens, cu_segments, (written & ~needless) | keep, limit=held)
        fewer = sums(trial, segment, count) < held
        written = torch.where(fewer[segment], trial, written)
    return written, loss


def sums(values: torch.Tensor, segment: torch.Tensor, count: int) -> torch.Tensor:
    """The sum of the values ``[T]`` of every segment, fp32 ``[count]``."""
    return torch.zeros(count, device=values.device).index_add_(0, segment, values.float())


def rank_in_segment(price: torch.Tensor, segment: torch.Tensor, cu_segments: torch.Tensor) -> torch.Tensor:
    """How many tokens of its segment have a higher price ``[T]``, or the same and come before: int64 ``[T]``."""
    order = price.argsort(descending=True, stable=True)
    order = order[segment[order].argsort(stable=True)]
    rank = torch.empty_like(order)
    rank[order] = position_in_sequence(cu_segments, len(price))
    return rank


def harm(written: torch.Tensor, cu_segments: torch.Tensor) -> torch.Tensor:
    """About how many tokens come out wrong if each written token were left to be guessed, fp32 ``[T]``.

    The token itself, and a share of the guesses that follow it up to the next written token.
    """
    _, distance = ahead(written, cu_segments, 1)
    end = cu_segments.long()[sequence_of_row(cu_segments, len(written)) + 1]
    rows = torch.arange(len(written), device=written.device)
    following = torch.where(distance[:, 0] > 0, distance[:, 0] - 1, end - rows - 1)
    return 1.0 + CASCADE * following


def within_budget(
    price: torch.Tensor, written: torch.Tensor, cu_segments, cu_documents, wanted: torch.Tensor, slots: int
) -> torch.Tensor:
    """The written tokens that ``wanted`` units (int64 ``[G]``) of every document hold, by falling price.

    The k-th unit of a segment holds its k-th ``slots`` dearest tokens, so units go to where the next one is worth most.
    Every segment has one unit at least.
    """
    count = len(cu_segments) - 1
    segment = sequence_of_row(cu_segments, len(price))
    rank = rank_in_segment(torch.where(written, price, -torch.inf), segment, cu_segments)
    unit = rank // slots
    most = int(cu_segments.diff().max()) // slots + 1
    worth = torch.zeros(count * most, device=price.device)
    own = segment * most + unit
    worth.index_add_(0, own[written], price[written])
    worth = worth.view(count, most)
    worth[:, 0] = torch.inf
    document = sequence_of_row(cu_documents, count)
    order = worth.flatten().argsort(descending=True, stable=True)
    order = order[document[order // most].argsort(stable=True)]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=price.device)
    place = place.view(count, most) - (cu_documents.long()[document] * most)[:, None]
    chosen = (place < wanted[document][:, None]) & (worth > 0)
    chosen[:, 0] = True
    return written & chosen.flatten()[own]


@torch.no_grad()
def choose_ztokens(
    model: SlotModel,
    tokens: torch.Tensor,
    cu_segments: torch.Tensor,
    cu_documents: torch.Tensor,
    ratio: torch.Tensor,
    *,
    fixed_units: bool = False,
    weights: torch.Tensor | None = None,
) -> ZTokens:
    """The Z-tokens of packed segments at a ratio asked of each document, by the closed loop.

    Where the ratio leaves slots for everything that would be guessed wrong, the copy is exact, and units end earlier
    than their slots are full. Where it does not, the tokens whose absence harms least are left out.

    Args:
        tokens: int64 ``[T]``; cu_segments int32 ``[S + 1]``; cu_documents int32 ``[G + 1]`` in segments; ratio
            fp32 ``[G]``.
        fixed_units: units of ``ratio`` tokens each.
        weights: fp32 ``[T]``, what a token's absence counts for, 1 for most; those of `KEPT` and more are written in
            any case, even past the budget, as far as the slots of a unit go where ``fixed_units`` are asked for.
    """
    slots, total, documents = model.config.num_codebooks, len(tokens), len(cu_documents) - 1
    weights = torch.ones(total, device=tokens.device) if weights is None else weights
    keep = weights >= KEPT
    written, loss = close(model, tokens, cu_segments, keep)
    segment, count = sequence_of_row(cu_segments, total), len(cu_segments) - 1
    document = sequence_of_row(cu_documents, count)
    price = weights * (HARM * harm(written, cu_segments) + loss)
    if fixed_units:
        return _fixed(model, tokens, written, price, cu_segments, cu_documents, ratio)
    needed = (sums(written, segment, count) / slots).ceil().clamp(min=1).long()
    wanted = (cu_segments[cu_documents.long()].diff() / ratio).floor().clamp(min=1).long()
    exact = (_totals(needed, document, documents) < wanted)[document]
    written = torch.where(
        exact[segment], written, within_budget(price, written, cu_segments, cu_documents, wanted, slots) | keep
    )
    # Segments with slots to spare get more units than they need, as many as the ratio asks. The guesses depend on the
    # units, so they are looked at once more.
    begin = cu_segments[cu_documents.long()[document]]
    stops, starts = (((cu - begin) / ratio[document]).floor().long() for cu in (cu_segments[1:], cu_segments[:-1]))
    units = torch.where(exact, _shared(stops - starts, needed, document, wanted), 0)

    def cut(own, cu, segments):
        return slot_mass(own, cu, slots, units[spare[segments]])

    spare = exact.nonzero()[:, 0]
    if len(spare):
        rows, cu = expand_ranges(cu_segments[spare], cu_segments[spare + 1])
        written[rows] = grow(model, tokens[rows], cu, written[rows], cut)
    mass = slot_mass(written, cu_segments, slots, units)
    return fill_slots(tokens, written, cu_segments, cu_documents, slots, mass)


def _shared(share, needed, document, wanted) -> torch.Tensor:
    """Units of every segment: what it needs, and more towards its even share while its document has units to spare."""
    units = torch.maximum(share, needed)
    excess = _totals(units, document, len(wanted)) - wanted
    slack = units - needed
    # Taken from the first segments that have some to give.
    before = slack.cumsum(0) - slack
    first = torch.full_like(wanted, before.max() if len(before) else 0)
    first = first.scatter_reduce(0, document, before, "amin")
    left = excess[document] - (before - first[document])
    return units - torch.minimum(left.clamp(min=0), slack)


def _totals(values: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64, device=values.device).index_add_(0, owner, values)


def _fixed(model, tokens, written, price, cu_segments, cu_documents, ratio) -> ZTokens:
    """Units of ``ratio`` tokens each: where they have a slot for every token the copy is exact."""
    slots = model.config.num_codebooks
    document = sequence_of_row(cu_documents, len(cu_segments) - 1)
    segment = sequence_of_row(cu_segments, len(tokens))
    mass = fixed_mass(ratio[document])[segment]
    units = halting_units(mass, cu_segments)
    cu_units = offsets(unit_lengths(units, int(units.cu_units[-1])))
    rank = rank_in_segment(torch.where(written, price, -torch.inf), units.unit.long(), cu_units)
    written = written & (rank < slots)
    spare = (ratio[document] <= slots).nonzero()[:, 0]
    if len(spare):
        rows, cu = expand_ranges(cu_segments[spare], cu_segments[spare + 1])

        def cut(own, cu, segments):
            return fixed_mass(ratio[document[spare[segments]]])[sequence_of_row(cu, len(own))]

        written[rows] = grow(model, tokens[rows], cu, written[rows], cut)
    return fill_slots(tokens, written, cu_segments, cu_documents, slots, mass)
