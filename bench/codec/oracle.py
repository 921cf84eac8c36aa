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
from ztok_fast.codec.passes import encode_documents, teacher_forced
from ztok_fast.codec.zbatch import ZBatch
from ztok_fast.ops.spec import Mismatch

DISTANCE_ROUNDING = 1e-4
"""How much farther than the nearest a code may be, relative to the squared length of the latent: float32 rounding of
the hidden states reaches the latents."""
LOGIT_ROUNDING = 1e-3
"""How far below the best logit a written token's may be; a tenth of the margin that exact mode allows for rounding."""
CHANGED_BY = {"int8": 0.02}
"""Share of tokens, or of codes and ends of units, that a precision may change. Its bits are tested in tests/engine."""


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
        embeddings = model.z_embeddings(model.dequantize(sections.codes), sections.unit_lengths)
        inputs = model.decoder_inputs(embeddings, sections, tokens, sections.cu_text)
        hidden = model.decompressor_hidden(inputs)
        short = []
        for rows, own in zip(hidden.split(1024), tokens.split(1024)):
            logits = model.adapted.logits(rows)
            short.append(logits.max(-1).values - logits.gather(-1, own[:, None])[:, 0])
    short = torch.cat(short)
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
