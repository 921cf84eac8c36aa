"""The draft of a text: what the compressor's language model reads to price the slots of Z-tokens (see `draft_head`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ztok_fast.codec.decoding import decode_text
from ztok_fast.codec.layout import position_in_sequence, sequence_of_row
from ztok_fast.codec.slot_model import SlotModel


def symbol_logits(model: SlotModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Of hidden states ``[B, D]``; see `DraftHead.symbols`."""
    choice = model.runtime.linear(model.draft.choice, hidden)
    return model.draft.symbols(model.runtime.logits(hidden).float(), choice)


@torch.no_grad()
def draft(model: SlotModel, named: Tensor, cu_text: Tensor, share: Tensor) -> Tensor:
    """The tokens of a draft, int64 ``[T]``: those that are named, and guesses from what is before each.

    Args:
        named: int64 ``[T]``, -1 where a token is guessed; cu_text: int32 ``[S + 1]``; share: int64 ``[S]``.
    """
    lengths = cu_text.diff().long()
    order = lengths.argsort(descending=True, stable=True)
    starts, longest = model.draft.starts(share[order]).float(), int(lengths.max())
    cells = torch.arange(longest) < lengths[:, None]
    forced = torch.full((len(lengths), longest), -1)
    forced[cells] = named
    before = torch.nn.functional.pad(forced[order] >= 0, (1, 0))[:, :-1]
    conditioning = model.draft.told(before, share[order, None].expand_as(before))
    once = torch.arange(len(order) + 1, dtype=torch.int32)
    written = decode_text(
        model.runtime,
        starts,
        torch.zeros_like(order),
        once,
        lengths[order],
        0,
        forced[order],
        conditioning,
        adapter="compressor",
    )
    found = torch.empty_like(written)
    found[order] = written
    return found[cells]


def draft_hidden(model: SlotModel, tokens: Tensor, written: Tensor, cu_text: Tensor, share: Tensor) -> Tensor:
    """The hidden states ``[T, D]`` that predict the symbols of packed drafts.

    Args:
        tokens: int64 ``[T]``; written: bool ``[T]``; cu_text: int32 ``[S + 1]``; share: int64 ``[S]``.
    """
    position = position_in_sequence(cu_text, len(tokens))
    own = share[sequence_of_row(cu_text, len(tokens))]
    rows = model.adapted.embedding(torch.roll(tokens, 1)) + model.draft.told(torch.roll(written, 1), own)
    rows = torch.where((position == 0)[:, None], model.draft.starts(own), rows)
    longest = int(cu_text.diff().max()) if len(cu_text) > 1 else 0
    return model.runtime.hidden(rows, position, cu_text, longest, adapter="compressor")


def symbol_losses(
    model: SlotModel, drafted: Tensor, named: Tensor, tokens: Tensor, cu_text: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """In nats, what each symbol costs, fp32 ``[T]``, and the text's own tokens where they are guessed, fp32 ``[N]``.

    Args:
        drafted, named: int64 ``[T]``, as in `draft`; tokens: int64 ``[T]``, the text.
    """
    hidden = draft_hidden(model, drafted, named >= 0, cu_text, share)
    symbols, guessed = [hidden.new_zeros(0).float()], [hidden.new_zeros(0).float()]
    step = model.rows_at_once
    for rows, own, truth in zip(hidden.split(step), named.split(step), tokens.split(step)):
        logits = model.runtime.logits(rows).float()
        found, _ = model.draft.symbols(logits, model.runtime.linear(model.draft.choice, rows).float())
        targets = torch.where(own >= 0, own, found.shape[1] - 1)
        symbols.append(nn.functional.cross_entropy(found, targets, reduction="none"))
        guessed.append(nn.functional.cross_entropy(logits[own < 0], truth[own < 0], reduction="none"))
    return torch.cat(symbols), torch.cat(guessed)
