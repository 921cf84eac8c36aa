"""Ways to store texts with a codec: as it is, without one of its language models, and chosen in simpler ways."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ztok_fast.codec import slot_prior
from ztok_fast.codec.errors import LossyTextWarning
from ztok_fast.codec.layout import position_in_sequence, sequence_of_row
from ztok_fast.codec.passes import BATCH_TOKENS, batches, decompress_documents, pack_tokens, teacher_forced
from ztok_fast.codec.pooled_model import PooledModel
from ztok_fast.codec.selection import rank_in_segment, within_budget
from ztok_fast.codec.slot_coding import encode_slots
from ztok_fast.codec.slot_model import SlotModel
from ztok_fast.codec.slots import fill_slots, slot_mass, written_tokens
from ztok_fast.codec.varint import join_parts
from ztok_fast.codec.zbatch import FLOAT
from ztok_fast.codec.ztokens import ZTokens
from ztok_fast.evaluation.sample import Sample
from ztok_fast.evaluation.scores import Outcome

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec


def compressed(sample: Sample, ratio: float, fixed_units: bool | None = None) -> ZTokens:
    """The Z-tokens of a sample's sections, as `ZTokCodec.compress` makes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossyTextWarning)
        z = sample.codec.compress(sample.texts, ratio, fixed_units=fixed_units)
    return z.sections(sample.codec.config.section_segments)[0]


@contextmanager
def without_compressor(codec: ZTokCodec) -> Iterator[None]:
    """Let a codec of pooled units take its latents from word embeddings alone."""
    assert isinstance(codec.model, PooledModel)
    codec.fingerprint  # noqa: B018  it is kept, and must not be that of the changed weights
    gain = codec.model.hidden_gain
    before = gain.detach().clone()
    with torch.no_grad():
        gain.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            gain.copy_(before)


def stored_bits(codec: ZTokCodec, z: ZTokens) -> tuple[float, float]:
    """Bits of Z-tokens as a file stores them, and with every code at its full width (`ZBatch.rate`)."""
    config = codec.config
    if z.slot_offsets is None:
        bits = z.ztokens * config.bits_per_ztoken
        return bits, bits
    places = 8 * len(encode_slots(z, config.codebook_size, config.max_unit_length, codes=False))
    plain = int((z.codes >= 0).sum()) * math.log2(config.codebook_size) + places
    stored = len(encode_slots(z, config.codebook_size, config.max_unit_length))
    if codec.engine != FLOAT:
        assert isinstance(codec.model, SlotModel)
        with_prior = len(join_parts(slot_prior.encode(codec.model, z)))
        stored = min(stored, with_prior)
    return 8 * stored, plain


def ztokens_of_documents(sample: Sample, z: ZTokens) -> torch.Tensor:
    """How many Z-tokens every document has, int64 ``[G]``, of those of its sections."""
    return z.joined(sample.counts).cu_ztokens.diff().long()


def told_tokens(z: ZTokens) -> torch.Tensor | None:
    """Which tokens the slots name, bool ``[T]``; ``None`` without slots."""
    return None if z.slot_offsets is None else written_tokens(z) >= 0


@torch.inference_mode()
def restored(sample: Sample, z: ZTokens) -> Outcome:
    """What the decompressor makes of Z-tokens, on the CPU."""
    model = sample.codec.model
    bits, plain = stored_bits(sample.codec, z)
    predicted, losses = [], []
    for batch in batches([len(s) for s in sample.sections], BATCH_TOKENS):
        own = z.select(list(batch)).to(model.device)
        tokens = pack_tokens([sample.sections[i] for i in batch], model.device)
        found, _, loss = teacher_forced(model, own, tokens)
        predicted.append(found.cpu())
        losses.append(loss.cpu() / math.log(2))
    free = pack_tokens(decompress_documents(model, z), "cpu")
    return Outcome(
        bits, plain, torch.cat(losses), torch.cat(predicted), free, told_tokens(z), ztokens_of_documents(sample, z)
    )


def rarity(sample: Sample) -> torch.Tensor:
    """How rare every token is, fp32 ``[T]`` above 0: −log2 of its share of the sample itself."""
    counts = torch.bincount(sample.tokens, minlength=sample.vocabulary)
    return ((len(sample) + 1) / counts[sample.tokens].float()).log2()


def dearest(sample: Sample, z: ZTokens, price: torch.Tensor) -> ZTokens:
    """Slots for the tokens of the highest price: in every section as many tokens and units as ``z`` has.

    Args:
        price: fp32 ``[T]`` above 0.
    """
    slots, section, cu = sample.codec.config.num_codebooks, sample.section, sample.cu_segments
    told = told_tokens(z)
    assert told is not None
    units = z.cu_ztokens.diff().long()
    chosen = within_budget(price, torch.ones_like(told), cu, sample.cu_sections, units, slots)
    allowed = torch.zeros(len(units), dtype=torch.int64).index_add_(0, section, told.long())
    rank = rank_in_segment(torch.where(chosen, price, -torch.inf), section, cu[sample.cu_sections.long()])
    chosen = chosen & (rank < allowed[section])
    # Units that no slot needs are shared out evenly.
    held = torch.zeros(len(cu) - 1, dtype=torch.int64).index_add_(0, sample.segment, chosen.long())
    needed = (-(-held // slots)).clamp(min=1)
    owner = sequence_of_row(sample.cu_sections, len(held))
    spare = units - torch.zeros_like(units).index_add_(0, owner, needed)
    place, own = position_in_sequence(sample.cu_sections, len(held)), sample.cu_sections.diff()[owner]
    more = spare[owner] * (place + 1) // own - spare[owner] * place // own
    mass = slot_mass(chosen, cu, slots, needed + more)
    return fill_slots(sample.tokens, chosen, cu, sample.cu_sections, slots, mass)


@torch.inference_mode()
def without_decompressor(sample: Sample, z: ZTokens) -> Outcome:
    """What Z-tokens say by themselves.

    Slots: the tokens that they name, and elsewhere the commonest of those that they do not name, by the sample's own
    counts, which also give the loss. Pooled units: what the copy path says without the model's hidden states.

    Raises:
        ValueError: pooled units without a copy path say nothing by themselves.
    """
    model = sample.codec.model
    bits, plain = stored_bits(sample.codec, z)
    ztokens, told = ztokens_of_documents(sample, z), told_tokens(z)
    if told is not None:
        counts = torch.bincount(sample.tokens[~told], minlength=sample.vocabulary)
        share = counts.double() / max(1, int(counts.sum()))
        predicted = torch.where(told, sample.tokens, counts.argmax())
        loss = torch.where(told, 0.0, -share[sample.tokens].log2())
        return Outcome(bits, plain, loss, predicted, predicted, told, ztokens)
    check_copy_path(sample.codec)
    found, losses = [], []
    for batch in batches([len(s) for s in sample.sections], BATCH_TOKENS):
        own = z.select(list(batch)).to(model.device)
        tokens = pack_tokens([sample.sections[i] for i in batch], model.device)
        _, bias = model.conditioning(model.embed(own), own, len(tokens))
        assert bias is not None
        for rows, truth in zip(bias.split(model.rows_at_once), tokens.split(model.rows_at_once)):
            logits = model.runtime.logits(rows.contiguous()).float()
            found.append(logits.argmax(-1).cpu())
            losses.append(torch.nn.functional.cross_entropy(logits, truth, reduction="none").cpu() / math.log(2))
    predicted = torch.cat(found)
    return Outcome(bits, plain, torch.cat(losses), predicted, predicted, None, ztokens)


def check_copy_path(codec: ZTokCodec) -> None:
    """Raise `ValueError` where Z-tokens say nothing without the decompressor's language model."""
    if not isinstance(codec.model, SlotModel) and not codec.config.copy_path:
        raise ValueError(
            "without: expected None or 'compressor', since Z-tokens of pooled units say nothing without the "
            "decompressor's language model unless the codec has a copy_path, got 'decompressor'"
        )
