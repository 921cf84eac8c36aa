"""The answers that runs are held against: the codec's model with float64 weights, every op forced to its reference.

transformers' RMS norm and rotary positions compute in float32 whatever the weights are; the rest is float64.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import ztok_fast
from bench.codec import files
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.layout import offsets
from ztok_fast.codec.passes import emit_documents, encode_documents, teacher_forced
from ztok_fast.codec.segment_model import SegmentModel
from ztok_fast.codec.zbatch import ZBatch
from ztok_fast.codec.ztokens import ZTokens
from ztok_fast.ops.spec import Mismatch

DISTANCE_ROUNDING = 1e-4
"""How much farther than the nearest a code may be, relative to the squared length of the latent: float32 rounding of
the hidden states reaches the latents."""
LOGIT_ROUNDING = 1e-3
"""How far below the best logit a written token's may be; a tenth of the margin that exact mode allows for rounding."""
CHANGED_BY = {"int8": 0.02}
"""Share of tokens, or of codes and ends of units, that a precision may change. Its bits are tested in tests/engine."""
NAMED_OTHERWISE = {"float": 0.02, "float32": 0.02, "int8": 0.08}
"""Share of tokens that a codec of slots may name or leave where float64 does not."""


@functools.cache
def _codec(name: str, device: str) -> ZTokCodec:
    codec = ZTokCodec.from_pretrained(files.folder(name))
    codec.model.double()
    return codec.to(device)


@torch.inference_mode()
def expected_units(name: str, device: str, documents: list[list[int]], ratio: float) -> list[tuple[Tensor, Tensor]]:
    """Unit lengths `[K]` and float64 latents `[K, d_z]` of every document (token lists of at most one section)."""
    model = _codec(name, device).model
    with ztok_fast.backend("reference"):
        encoded = encode_documents(model, documents, ratio)
    counts = encoded.z.cu_ztokens.diff().tolist()
    latents = encoded.quantized.latents.double()
    return list(zip(encoded.z.unit_lengths.cpu().split(counts), latents.cpu().split(counts)))


def check_codes(
    name: str, expected: list[tuple[Tensor, Tensor]], found: list[tuple[Tensor, Tensor]], precision: str = "float"
) -> None:
    """Raise `Mismatch` unless units are those expected and each code is the nearest to what the levels before it left.

    Args:
        expected: of `expected_units`; found: unit lengths `[K]` and codes `[K, L]` of every document.
        precision: what the base model ran in (`CHANGED_BY`).
    """
    changed, total = 0, sum(len(lengths) for lengths, _ in expected)
    allowed_changes = CHANGED_BY.get(precision, 0) * total
    if len(found) != len(expected):
        raise Mismatch(f"documents: expected {len(expected)}, got {len(found)}")
    books = _codec(name, "cpu").model.codebooks.detach()
    for index, ((lengths, latents), (own_lengths, codes)) in enumerate(zip(expected, found)):
        if own_lengths.shape != lengths.shape or not torch.equal(own_lengths.long(), lengths.long()):
            ends, own_ends = (set(x.cumsum(0).tolist()) for x in (lengths, own_lengths))
            changed += len(ends ^ own_ends)
            if changed > allowed_changes:
                counts = f"{len(own_lengths)} units, expected {len(lengths)}"
                raise Mismatch(f"document {index}: units of other lengths ({counts})")
            continue  # its codes stand for other units
        in_range = not codes.numel() or 0 <= int(codes.min()) <= int(codes.max()) < books.shape[1]
        if codes.shape != (len(lengths), len(books)) or not in_range:
            raise Mismatch(f"document {index}: codes of shape {list(codes.shape)} or out of range")
        allowed = DISTANCE_ROUNDING * latents.square().sum(1)
        residual = latents
        for level, book in enumerate(books):
            distances = torch.cdist(residual, book.cpu(), compute_mode="donot_use_mm_for_euclid_dist").square()
            code = codes[:, level].long()
            short = distances.gather(1, code[:, None])[:, 0] - distances.min(1).values
            wrong = int((short > allowed).sum())
            changed += wrong
            if changed > allowed_changes * len(books):
                raise Mismatch(f"document {index}: {wrong} codes of level {level} are not the nearest")
            residual = residual - book.cpu()[code]


@torch.inference_mode()
def expected_names(name: str, device: str, documents: list[list[int]], ratio: float) -> list[Tensor]:
    """Of every document the tokens that a codec of slots names, int64 `[T]`, -1 at others."""
    model = _codec(name, device).model
    with ztok_fast.backend("reference"):
        z = emit_documents(model, documents, ratio)
    return list(model.written(z).cpu().split([len(own) for own in documents]))


@torch.inference_mode()
def check_slots(
    name: str,
    device: str,
    documents: list[list[int]],
    expected: list[Tensor],
    found: list[tuple[Tensor, ...]],
    ratio: float,
    precision: str = "float",
) -> None:
    """Raise `Mismatch` unless the Z-tokens of slots stand for the documents and leave to guesses what is guessed right.

    Units must fit the text, the slots and the budget; names must be the text's tokens. Where the budget leaves units to
    spare, all other tokens must be the arg-max given the text before them (up to `LOGIT_ROUNDING`); where it does not,
    all units are used. What is named must be about what float64 names: a rounded logit changes what is guessed
    right, and the loop goes on from there.

    Args:
        expected: of `expected_names`; found: unit lengths `[K]`, codes and places `[K, L]` of every document.
    """
    codec = _codec(name, device)
    model, config = codec.model, codec.config
    size, slots, changed = config.segment_length, config.num_codebooks, 0
    if len(found) != len(documents):
        raise Mismatch(f"documents: expected {len(documents)}, got {len(found)}")
    short_of: list[Tensor] = []
    for index, (tokens, (lengths, codes, places), own_expected) in enumerate(zip(documents, found, expected)):
        text, cu = torch.tensor(tokens), lengths.long().cumsum(0)
        edges = torch.tensor([min(at + size, len(tokens)) for at in range(0, len(tokens), size)])
        if int(lengths.min()) < 1 or int(cu[-1]) != len(tokens) or not torch.isin(edges, cu).all():
            raise Mismatch(f"document {index}: units do not fit its segments of {size} tokens")
        filled = codes >= 0
        if codes.shape[1] != slots or not torch.equal(filled, places >= 0) or bool((places >= lengths[:, None]).any()):
            raise Mismatch(f"document {index}: slots outside their units")
        at = ((cu - lengths)[:, None] + places)[filled]
        if len(at.unique()) < len(at) or not torch.equal(text[at], codes[filled].long()):
            raise Mismatch(f"document {index}: slots that do not name the tokens at their places")
        budget = max(len(edges), int(len(tokens) / torch.tensor(ratio)))
        if len(lengths) > budget:
            raise Mismatch(f"document {index}: {len(lengths)} units, expected at most {budget}")
        named = torch.full_like(text, -1)
        named[at] = text[at]
        changed += int((named != own_expected).sum())
        units = torch.bincount(torch.bucketize(cu, edges), minlength=len(edges))
        z = ZTokens(
            codes.int(), lengths.int(), offsets(units), torch.tensor([0, len(edges)], dtype=torch.int32), places.int()
        ).to(device)
        needed = offsets((named >= 0).long())[offsets(torch.diff(edges, prepend=edges.new_zeros(1))).long()].diff()
        if int((needed / slots).ceil().clamp(min=1).sum()) < len(lengths):
            with ztok_fast.backend("reference"):
                short_of.append(_below_the_best(model, z, text.to(device))[(named < 0).to(device)])
    total = sum(map(len, documents))
    wrong = int((torch.cat(short_of) > LOGIT_ROUNDING).sum()) if short_of else 0
    if wrong > CHANGED_BY.get(precision, 0) * total:
        raise Mismatch(f"slots: {wrong} tokens are neither named nor the arg-max, in documents with units to spare")
    if changed > NAMED_OTHERWISE[precision] * total:
        raise Mismatch(f"slots: {changed} of {total} tokens are named here or in float64, and not in both")


def _below_the_best(model: SegmentModel, z: ZTokens, tokens: Tensor) -> Tensor:
    """By how much the logit of each token is below the best one, given the tokens before it: `[T]`."""
    hidden = model.decompressor_hidden(model.decoder_inputs(model.embed(z), z, tokens, z.cu_text))
    short = [hidden.new_zeros(0)]
    for rows, own in zip(hidden.split(1024), tokens.split(1024)):
        logits = model.adapted.logits(rows)
        short.append(logits.max(-1).values - logits.gather(-1, own[:, None])[:, 0])
    return torch.cat(short)


@torch.inference_mode()
def check_tokens(name: str, device: str, z: ZBatch, found: list[list[int]], precision: str = "float") -> None:
    """Raise `Mismatch` unless every token is the arg-max of the logits given the tokens that were written before it.

    One pass over the whole text, so no cache and no step-by-step decoding takes part. A token whose logit is within
    rounding of the best counts as the arg-max; the text after it is then judged by what was written.
    """
    codec = _codec(name, device)
    model = codec.model
    counts = [document.tokens for document in z.documents]
    if [len(own) for own in found] != counts:
        raise Mismatch(f"tokens: expected {counts} of the documents, got {[len(own) for own in found]}")
    tokens = torch.tensor([token for own in found for token in own], dtype=torch.int64, device=device)
    if bool((tokens < 0).any()) or bool((tokens >= model.adapted.embedding.weight.shape[0]).any()):
        raise Mismatch("tokens: outside the vocabulary")
    with ztok_fast.backend("reference"):
        sections = z.sections(codec.config.section_segments)[0].to(device)
        short = _below_the_best(model, sections, tokens)
        named = model.written(sections)
    if named is not None:
        told = named >= 0
        if not torch.equal(named[told], tokens[told]):
            raise Mismatch(f"tokens: {int((named[told] != tokens[told]).sum())} are not those that slots name")
        short[told] = 0.0
    wrong = int((short > LOGIT_ROUNDING).sum())
    if wrong > CHANGED_BY.get(precision, 0) * len(tokens):
        by = f"by up to {float(short.max()):.3g} in the logit"
        raise Mismatch(f"tokens: {wrong} of {len(tokens)} are not the arg-max ({by})")


@torch.inference_mode()
def check_steps(codec: ZTokCodec, z: ZBatch, found: list[list[int]]) -> None:
    """Raise `Mismatch` unless steps of the engine wrote exactly what one pass of it over the text predicts."""
    if z.precision == "float":
        return
    sections = z.sections(codec.config.section_segments)[0]
    tokens = torch.tensor([token for own in found for token in own], dtype=torch.int64)
    predicted = teacher_forced(codec.model, sections, tokens)[0]
    if not torch.equal(predicted, tokens):
        wrong = int((predicted != tokens).sum())
        raise Mismatch(f"tokens: {wrong} of {len(tokens)} are not those of one pass of the engine")
