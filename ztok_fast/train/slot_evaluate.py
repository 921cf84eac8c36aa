"""Evaluation of a codec of slots while it trains: what an exact copy writes, and what the next Z-token costs."""

from __future__ import annotations

import math

import torch

from ztok_fast.codec.draft import draft, symbol_losses
from ztok_fast.codec.draft_head import share_of
from ztok_fast.codec.engines import AUTO, Engines
from ztok_fast.codec.layout import sequence_of_row
from ztok_fast.codec.selection import choose_ztokens, close, guess
from ztok_fast.codec.slot_space import GAPS
from ztok_fast.codec.slots import fill_slots, written_tokens
from ztok_fast.train.batches import Section, make_batch
from ztok_fast.train.inferencer import inferencer_losses

LN2 = math.log(2)


@torch.inference_mode()
def evaluate_slots(codec, documents: list[list[int]]) -> dict:
    """The closed loop on documents of one section each.

    Returns:
        ``written``: share of the tokens that an exact copy writes; ``ratio``: text tokens per Z-token then;
        ``guessed_bits``: bits per text token of what is guessed; ``base_bits``: bits per text token under the base.
    """
    model, config = codec.model, codec.config
    sections = [Section(list(d[: config.section_tokens])) for d in documents if d]
    written = tokens = units = 0
    guessed_bits = base_bits = 0.0
    for first in range(0, len(sections), 8):
        batch = make_batch(sections[first : first + 8], config.segment_length).to(model.device)
        chosen, _ = close(model, batch.tokens, batch.cu_segments)
        loss = guess(model, batch.tokens, chosen, batch.cu_segments).loss
        guessed_bits += float((loss * ~chosen).sum()) / LN2
        base_bits += float(model.surprisal(batch.tokens, batch.cu_segments).sum())
        tokens, written = tokens + len(batch.tokens), written + int(chosen.sum())
        before = torch.nn.functional.pad(chosen.long().cumsum(0), (1, 0))[batch.cu_segments.long()]
        units += int((before.diff() / config.num_codebooks).ceil().clamp(min=1).sum())
    return {
        "written": written / tokens,
        "ratio": tokens / units,
        "guessed_bits": guessed_bits / tokens,
        "base_bits": base_bits / tokens,
    }


RATIOS = (4, 8, 16)
"""At which the compressor is evaluated."""


@torch.inference_mode()
def evaluate_compressor(codec, documents: list[list[int]]) -> dict:
    """What the symbols of Z-tokens cost, on documents of one section each.

    Returns:
        For each ratio ``symbol_bits``, per text token, and ``draft_accuracy``, the share of right tokens in the draft.
    """
    model, config = codec.model, codec.config
    Engines(model, AUTO).use()
    sections = [Section(list(d[: config.section_tokens])) for d in documents if d]
    bits, right, tokens = dict.fromkeys(RATIOS, 0.0), dict.fromkeys(RATIOS, 0), 0
    for first in range(0, len(sections), 8):
        batch = make_batch(sections[first : first + 8], config.segment_length).to(model.device)
        cu, count = batch.cu_segments, len(batch.sections)
        section = sequence_of_row(batch.cu_sections, len(cu) - 1)
        tokens += len(batch.tokens)
        for ratio in RATIOS:
            z = choose_ztokens(model, batch.tokens, cu, batch.cu_sections, torch.full((count,), float(ratio)))
            named = written_tokens(z)
            share = share_of(named >= 0, section[sequence_of_row(cu, len(named))], count)[section]
            written = draft(model, named, cu, share)
            symbols, _ = symbol_losses(model, written, named, batch.tokens, cu, share)
            bits[ratio] += float(symbols.sum()) / LN2
            right[ratio] += int((written == batch.tokens).sum())
    return {
        "symbol_bits": {str(r): value / tokens for r, value in bits.items()},
        "draft_accuracy": {str(r): value / tokens for r, value in right.items()},
    }


@torch.inference_mode()
def evaluate_inferencer(codec, documents: list[list[int]]) -> dict:
    """What the inferencer knows of the next Z-token, on documents of one section each.

    Returns:
        ``bits_per_ztoken``: of the slots and of end-of-Z; ``uniform_bits``: of as many slots, each any token at any of
        `GAPS` distances.
    """
    model, config = codec.model, codec.config
    sections = [Section(list(d[: config.section_tokens])) for d in documents if d]
    bits = uniform = 0.0
    rows = 0
    for first in range(0, len(sections), 8):
        batch = make_batch(sections[first : first + 8], config.segment_length).to(model.device)
        chosen, _ = close(model, batch.tokens, batch.cu_segments, prunings=0)
        z = fill_slots(batch.tokens, chosen, batch.cu_segments, batch.cu_sections, config.num_codebooks)
        loss, _ = inferencer_losses(model, batch, z, model.embed(z), answers=False)
        slots = int((z.codes >= 0).sum())
        rows += z.ztokens + len(z)  # every document ends
        bits += float(loss) * (slots + len(z)) / LN2
        uniform += slots * math.log2(config.codebook_size * GAPS)
    return {"bits_per_ztoken": bits / rows, "uniform_bits": uniform / rows}
