"""Evaluation of a codec of slots while it trains: what an exact copy writes, and what the next Z-token costs."""

from __future__ import annotations

import math

import torch

from ztok_fast.codec.selection import close, guess
from ztok_fast.codec.slot_space import GAPS
from ztok_fast.codec.slots import fill_slots
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
        count = z.ztokens + len(z)  # every document ends
        bits, rows = bits + float(loss) * count / LN2, rows + count
        uniform += int((z.codes >= 0).sum()) * math.log2(config.codebook_size * GAPS)
    return {"bits_per_ztoken": bits / rows, "uniform_bits": uniform / rows}
