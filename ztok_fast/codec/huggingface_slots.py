"""Codecs of slots as one writes them without this library: padded batches and plain torch, as in `huggingface`.

The definitions are those of `ztok_fast.codec.slots`, `selection` and `slot_model`. Segments are rows of ``[R, S]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor

from ztok_fast.codec.selection import CASCADE, HARM, MARGIN, PRUNINGS, ROUNDS, TURNS
from ztok_fast.codec.slot_model import AHEAD, DISTANCES
from ztok_fast.codec.slot_space import GAPS

ONE = 1 << 20
"""Halting mass is counted in 2^-20 of a unit (the definition), so that its sums are exact integers."""
LOGIT_ROWS = 4096


@dataclass
class Segments:
    """Padded segments: tokens and their validity ``[R, S]``, the document of each row ``[R]``, and what each token
    says ahead, as `said` has it: it is the same in all passes."""

    ids: Tensor
    valid: Tensor
    document: Tensor
    said: Tensor

    def rows(self, chosen: Tensor) -> Segments:
        return Segments(self.ids[chosen], self.valid[chosen], self.document[chosen], self.said[chosen])

    @property
    def last(self) -> Tensor:
        return self.valid & ~torch.cat([self.valid[:, 1:], torch.zeros_like(self.valid[:, :1])], 1)


@dataclass
class Units:
    """Z-tokens of padded segments: counts ``[R]``; lengths, starts ``[R, K]``; codes, places ``[R, K, L]``."""

    counts: Tensor
    lengths: Tensor
    starts: Tensor
    codes: Tensor
    places: Tensor

    def of_rows(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lengths, codes and places of some rows, without padding, on the CPU."""
        own = torch.arange(self.lengths.shape[1], device=self.counts.device) < self.counts[chosen, None]
        found = (self.lengths[chosen][own], self.codes[chosen][own], self.places[chosen][own])
        return tuple(value.cpu() for value in found)  # type: ignore[return-value]


def named_tokens(lengths: Tensor, codes: Tensor, places: Tensor) -> Tensor:
    """The tokens that Z-tokens name, int64 ``[T]``, -1 where they name none."""
    named = torch.full((int(lengths.sum()),), -1, dtype=torch.int64, device=codes.device)
    rows = (lengths.cumsum(0) - lengths).long()[:, None] + places
    named[rows[codes >= 0]] = codes[codes >= 0].long()
    return named


def unit_ends(mass: Tensor, last: Tensor) -> Tensor:
    """Where integrate-and-fire along the last dimension ends a unit, bool `[..., S]`; padding has mass 0.

    Args:
        mass: `[..., S]`; last: bool, the last token of every segment.
    """
    quanta = torch.round(mass.double() * ONE).clamp(0, ONE).long()
    prefix = quanta.cumsum(-1)
    return ((prefix >> 20) > ((prefix - quanta) >> 20)) | last


def cut_units(written: Tensor, own: Segments, slots: int, units: Tensor | None) -> Tensor:
    """Where units end, bool ``[R, S]``: as soon as their slots are full, or earlier for ``units [R]`` of a row."""
    length, held = own.valid.sum(1), written.sum(1)
    share = torch.full((len(held),), 1.0 / slots, dtype=torch.float64, device=held.device)
    rest = torch.zeros_like(share)
    if units is not None:
        share = torch.maximum(share, units.double() / held.clamp(min=1)).clamp(max=1.0)
        rest = ((units - held).double() / (length - held).clamp(min=1)).clamp(0.0, 1.0)
    share, rest = ((value * ONE).ceil() / ONE for value in (share, rest))
    mass = torch.where(written, share[:, None], rest[:, None])
    # The share of the last written token moves to the segment's last token.
    column = torch.arange(written.shape[1], device=held.device)
    latest = torch.where(written, column, -1).amax(1)
    mass = torch.where((column == latest[:, None]), rest[:, None], mass)
    mass = torch.where(own.last & (latest >= 0)[:, None], share[:, None], mass)
    return unit_ends(mass.float() * own.valid, own.last)


def fill(written: Tensor, own: Segments, ends: Tensor, slots: int) -> Units:
    """The Z-tokens of segments, given what is written and where units end."""
    rows, size = written.shape
    column = torch.arange(size, device=ends.device).expand(rows, -1)
    unit = ends.cumsum(1) - ends.long()
    begins = own.valid & torch.cat([torch.ones_like(ends[:, :1]), ends[:, :-1]], 1)
    start = torch.where(begins, column, 0).cummax(1).values
    before = written.cumsum(1) - written.long()
    slot = before - before.gather(1, start)
    counts = ends.sum(1)
    shape = rows, max(1, int(counts.max()))
    codes = torch.full((*shape, slots), -1, dtype=torch.int64, device=ends.device)
    places = codes.clone()
    row = torch.arange(rows, device=ends.device)[:, None].expand(-1, size)
    at = row[written], unit[written], slot[written]
    codes[at], places[at] = own.ids[written], (column - start)[written]
    lengths, starts = (torch.zeros(shape, dtype=torch.int64, device=ends.device) for _ in range(2))
    starts[row[begins], unit[begins]] = column[begins]
    lengths[row[ends], unit[ends]] = (column - start + 1)[ends]
    return Units(counts, lengths, starts, codes, places)


def embed(parts, codes: Tensor, places: Tensor) -> Tensor:
    """Input embeddings ``[..., D]`` of Z-tokens ``[..., L]``."""
    weights, total = parts.weights, torch.zeros(())
    words = parts.model.get_input_embeddings()(codes.clamp(min=0)) @ weights["slot_projection.weight"].T
    where = weights["slot_places.weight"][places.clamp(0, DISTANCES - 1)]
    for slot in range(codes.shape[-1]):
        own = words[..., slot, :] * weights["slot_gates"][slot] + where[..., slot, :]
        total = total + torch.where((codes[..., slot] >= 0)[..., None], own, 0.0)
    return torch.where(codes[..., :1] >= 0, total, weights["start_embedding"])


def said(parts, ids: Tensor) -> Tensor:
    """What tokens ``[R, S]`` say to the rows before them, ``[R, S, AHEAD, D]``: by how many written ones are nearer."""
    words = parts.model.get_input_embeddings()(ids) @ parts.weights["ahead_projection.weight"].T
    return words.unflatten(-1, (AHEAD, -1))


def conditioning(parts, written: Tensor, said: Tensor) -> Tensor:
    """What every text row is told of the written tokens after it, ``[R, S, D]``; written: bool ``[R, S]``."""
    weights, size = parts.weights, written.shape[1]
    column = torch.arange(size, device=written.device)
    # Columns of the written tokens in order, then `size` for none.
    order = nn.functional.pad(torch.where(written, column, size).sort(1).values, (0, AHEAD), value=size)
    passed = written.cumsum(1)
    row, rows = torch.arange(len(written), device=written.device)[:, None], 0.0
    for step in range(AHEAD):
        at = order.gather(1, passed + step)
        near = torch.where(at < size, at - column, 0).clamp(max=DISTANCES)
        gate = weights["ahead_gates"][step][near] * (near > 0)[..., None]
        rows = rows + weights["ahead_places"][step][near] + said[row, at.clamp(max=size - 1), step] * gate
    return rows  # type: ignore[return-value]


def guess(parts, own: Segments, written: Tensor, units: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whether each token is written, or guessed right with a margin, given the true text before it: bool ``[R, S]``;
    and −ln p of those that are guessed, ``[R, S]``."""
    model, slots = parts.model, parts.config.num_codebooks
    z = fill(written, own, cut_units(written, own, slots, units), slots)
    rows, size = own.ids.shape
    most = z.lengths.shape[1]
    table = model.get_input_embeddings()
    start = parts.weights["start_embedding"].expand(rows, 1, -1)
    text = torch.cat([start, table(own.ids[:, :-1])], 1)
    text = text + conditioning(parts, written, own.said)
    column = torch.arange(most, device=own.ids.device)
    told = column < z.counts[:, None]
    hidden = model.model(
        inputs_embeds=torch.cat([embed(parts, z.codes, z.places), text], 1),
        attention_mask=torch.cat([told, own.valid], 1).long(),
        position_ids=torch.cat([z.starts, torch.arange(size, device=column.device).expand(rows, -1)], 1),
        use_cache=False,
    ).last_hidden_state[:, most:]
    right, loss = written.clone(), torch.zeros(written.shape, device=written.device)
    asked = own.valid & ~written
    truth, found, losses = own.ids[asked], [right[:0, 0]], [loss[:0, 0]]
    for states, true in zip(hidden[asked].split(LOGIT_ROWS), truth.split(LOGIT_ROWS)):
        logits = model.lm_head(states)
        best = logits.topk(2, dim=-1)
        found.append((best.indices[:, 0] == true) & (best.values[:, 0] - best.values[:, 1] >= MARGIN))
        losses.append(nn.functional.cross_entropy(logits, true, reduction="none"))
    right[asked], loss[asked] = torch.cat(found), torch.cat(losses)
    return right | ~own.valid, loss


def grow(parts, own: Segments, written: Tensor, units: Tensor | None, limit: Tensor | None = None) -> Tensor:
    """Write more until no guess is wrong, or a segment has ``limit [R]`` written tokens."""
    written = written.clone()
    limit = own.valid.sum(1) + 1 if limit is None else limit
    left = (written.sum(1) < limit).nonzero()[:, 0]
    for rounds in range(ROUNDS, -1, -1):
        if not len(left):
            break
        some = own.rows(left)
        wrong = ~guess(parts, some, written[left], None if units is None else units[left])[0]
        if not rounds:
            wrong = some.valid
        written[left] |= wrong
        left = left[wrong.any(1) & (written[left].sum(1) < limit[left])]
    return written


def close(parts, own: Segments) -> tuple[Tensor, Tensor]:
    """The closed loop: what to write so that all else is guessed right, bool ``[R, S]``; and each token's loss."""
    even = (torch.arange(own.ids.shape[1], device=own.ids.device) % 2 == 0) & own.valid
    odd = own.valid & ~even
    (of_odd, odd_loss), (of_even, even_loss) = (guess(parts, own, told, None) for told in (even, odd))
    loss = torch.where(even, even_loss, odd_loss)
    written = grow(parts, own, own.valid & ~torch.where(even, of_even, of_odd), None)
    for _ in range(PRUNINGS):
        needless = torch.zeros_like(written)
        turn = written.cumsum(1) % TURNS
        for part in range(TURNS):
            untold = written & (turn == part)
            right, found = guess(parts, own, written & ~untold, None)
            needless |= untold & right
            loss = torch.where(untold, found, loss)
        held = written.sum(1)
        trial = grow(parts, own, written & ~needless, None, held)
        written = torch.where((trial.sum(1) < held)[:, None], trial, written)
    return written, loss


def choose(parts, own: Segments, ratio: float) -> Units:
    """The Z-tokens of documents: exact where the ratio leaves slots for all, else those that are worth most."""
    slots = parts.config.num_codebooks
    (written, loss), lengths = close(parts, own), own.valid.sum(1)
    needed = (written.sum(1) / slots).ceil().clamp(min=1).long()
    units = torch.zeros_like(needed)
    for document in own.document.unique().tolist():
        rows = (own.document == document).nonzero()[:, 0]
        stops = lengths[rows].cumsum(0)
        wanted = max(1, int(stops[-1] / torch.tensor(ratio)))
        if int(needed[rows].sum()) < wanted:
            share = (stops / ratio).floor().long()
            share = share - nn.functional.pad(share, (1, 0))[:-1]
            share = torch.maximum(share, needed[rows])
            # Not more than the document has: the first segments that got more than they need give it back.
            slack = share - needed[rows]
            given = (int(share.sum()) - wanted - (slack.cumsum(0) - slack)).clamp(min=0)
            units[rows] = share - torch.minimum(given, slack)
        else:
            written[rows] = _dearest(own.rows(rows), written[rows], loss[rows], wanted, slots)
    spare = (units > 0).nonzero()[:, 0]
    if len(spare):
        written[spare] = grow(parts, own.rows(spare), written[spare], units[spare])
    return fill(written, own, cut_units(written, own, slots, units), slots)


def _dearest(own: Segments, written: Tensor, loss: Tensor, wanted: int, slots: int) -> Tensor:
    """What the ``wanted`` units of one document hold."""
    size = written.shape[1]
    column = torch.arange(size, device=written.device)
    # The next written token after each, or the segment's end.
    limit = own.valid.sum(1, keepdim=True)
    at = torch.where(written, column, limit)
    following = nn.functional.pad(at.flip(1).cummin(1).values.flip(1)[:, 1:], (0, 1), value=size)
    following = torch.minimum(following, limit)
    price = loss + HARM * (1.0 + CASCADE * (following - column - 1))
    price = torch.where(written, price, -torch.inf)
    rank = price.argsort(dim=1, descending=True, stable=True).argsort(1)
    unit = rank // slots
    worth = torch.zeros(len(written), size // slots + 1, device=written.device)
    worth.scatter_add_(1, unit, price.masked_fill(~written, 0.0))
    worth[:, 0] = torch.inf
    chosen = torch.zeros_like(worth, dtype=torch.bool).flatten()
    chosen[worth.flatten().argsort(dim=0, descending=True, stable=True)[:wanted]] = True
    chosen = chosen.view_as(worth) & (worth > 0)
    chosen[:, 0] = True
    return written & chosen.gather(1, unit)


class Forced(LogitsProcessor):
    """Lets `generate` write the tokens that are named, ``[B, S]``, and guess where there is -1."""

    def __init__(self, named: Tensor) -> None:
        self.named, self.column = named, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        named = self.named[:, self.column]
        self.column += 1
        told = (named >= 0).nonzero()[:, 0]
        scores = scores.clone()
        scores[told] = -torch.inf
        scores[told, named[told]] = 0.0
        return scores


def continue_ztokens(parts, documents, new: int) -> list[Tensor]:
    """The likeliest next Z-tokens of documents, as `huggingface.continue_ztokens`: codes and places ``[new, 2 L]``."""
    weights, device, config = parts.weights, parts.model.device, parts.config
    words, head = parts.model.get_input_embeddings(), parts.model.get_output_embeddings()

    def embed(tokens: Tensor, gaps: Tensor) -> Tensor:
        return words(tokens) + weights["zspace.gap_rows"][gaps]

    rows = []
    for lengths, codes, places in documents:
        named = named_tokens(lengths, codes, places).to(device)
        at = (named >= 0).nonzero()[:, 0]
        gaps = at.diff(prepend=at.new_tensor([-1])) - 1
        rows.append(torch.cat([weights["zspace.marks"][:1], embed(named[at], gaps.clamp(max=GAPS - 1))]))
    counts = torch.tensor([len(own) for own in rows], device=device)
    inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    column = torch.arange(inputs.shape[1], device=device)
    mask = (column >= (inputs.shape[1] - counts)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # End-of-Z is not among the choices, nor gaps of which a unit could not hold one for each slot.
    choices = min(GAPS, max(1, config.max_unit_length // config.num_codebooks))
    cache, chosen = DynamicCache(), []
    for step in range(new * config.num_codebooks):
        hidden = parts.model.model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits = nn.functional.linear(hidden, weights["zspace.gap_head.weight"], weights["zspace.gap_head.bias"])
        gap = logits[:, :choices].argmax(-1)
        token = head(hidden + weights["zspace.gap_biases"][gap]).argmax(-1)
        chosen.append(torch.stack([token, gap], 1))
        if step + 1 < new * config.num_codebooks:
            inputs = embed(token, gap)[:, None]
            mask = nn.functional.pad(mask, (0, 1), value=1)
            positions = positions[:, -1:] + 1
    codes, gaps = torch.stack(chosen, 1).unflatten(1, (new, -1)).unbind(-1)
    return list(torch.cat([codes, (gaps + 1).cumsum(-1) - 1], -1).cpu())
