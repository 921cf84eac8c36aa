"""The training objective, term by term; every weighted term moves the parameters it is meant to move.

loss = CE(x | Z) + λ_commit·commitment + λ_code·codebook + λ_len·(E[K]/N − 1/r)²
       + λ_use·usage + λ_density·density + λ_z·CE(next Z-token) + λ_answer·CE(answer | Z, question)
       + λ_autoregressive·CE(Z-tokens that the compressor writes one by one), for the emission "stop"
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ztok_fast.codec.autoregressive import autoregressive_loss
from ztok_fast.codec.emission import surprisal_mass
from ztok_fast.codec.layout import sequence_of_row
from ztok_fast.codec.pooled_model import Encoding, PooledModel
from ztok_fast.train.batches import Batch
from ztok_fast.train.inferencer import inferencer_losses


@dataclass
class LossWeights:
    """Weights λ of the terms beside CE(x | Z); a term of weight 0 is not computed."""

    commitment: float = 1.0
    codebook: float = 1.0
    length: float = 10.0
    usage: float = 0.01
    density: float = 5.0
    zspace: float = 0.05
    answer: float = 0.1
    autoregressive: float = 0.1

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"loss weight {f.name}: expected a finite number of at least 0, got {value!r}")


@dataclass
class Phase:
    """What a training step does besides its batch; a function of the step alone.

    Attributes:
        blend: 0 = continuous latents, 1 = quantised; between, the decompressor sees a mixture.
        sampling: probability that a text input of the decompressor is its own prediction (scheduled sampling).
        noise: probability that a text input of the decompressor is a random token.
        level_dropout: probability that a segment uses fewer residual levels.
        predicted_mass: use the learned mass; before that, the surprisal's own.
        density: compute the density term.
        seed: of this step's random draws.
    """

    blend: float = 1.0
    sampling: float = 0.0
    noise: float = 0.0
    level_dropout: float = 0.0
    predicted_mass: bool = True
    density: bool = True
    seed: int = 0


class Objective(nn.Module):
    """Wraps the model so that one ``forward`` gives every loss term (what DDP and FSDP need)."""

    def __init__(self, model: PooledModel, weights: LossWeights) -> None:
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, batch: Batch, ratio: torch.Tensor, phase: Phase) -> tuple[dict[str, torch.Tensor], Encoding]:
        """The loss terms (0-d, unweighted; ``"total"`` is their weighted sum) and the encoded batch.

        Args:
            ratio: fp32 ``[G]``, the ratio asked of each section.
        """
        model, weights = self.model, self.weights
        draw = torch.Generator(device=batch.tokens.device).manual_seed(phase.seed)
        levels = self._draw_levels(len(batch.cu_segments) - 1, phase.level_dropout, draw)
        target = None
        learn_density = weights.density > 0 and phase.density
        if learn_density or not phase.predicted_mass:
            target = self._target_mass(batch, ratio)
        encoded = model.encode(
            batch.tokens,
            batch.cu_segments,
            batch.cu_sections,
            ratio,
            levels,
            mass=None if phase.predicted_mass else target,
        )
        terms = {}
        vectors = blend_vectors(encoded, phase.blend)
        embeddings = model.z_embeddings(vectors, encoded.z.unit_lengths)
        logits = self._decompress(batch, encoded, embeddings, phase, draw)
        terms["reconstruction"] = cross_entropy(logits, batch.tokens)
        terms["accuracy"] = (logits.detach().argmax(-1) == batch.tokens).float().mean()
        quantizing = phase.blend > 0
        if weights.commitment and quantizing:
            terms["commitment"] = encoded.quantized.commitment
        if weights.codebook and quantizing:
            terms["codebook"] = encoded.quantized.codebook_loss
        if weights.usage and quantizing:
            terms["usage"] = usage_loss(encoded.quantized.latents, model.codebooks)
        section = sequence_of_row(batch.cu_sections, len(batch.cu_segments) - 1)[
            sequence_of_row(batch.cu_segments, len(batch.tokens))
        ]
        if weights.length:
            terms["length"] = length_loss(encoded.raw_mass, section, ratio)
        if learn_density and target is not None:
            terms["density"] = ((encoded.raw_mass - target) * ratio[section]).square().mean()
        if (weights.zspace or weights.answer) and quantizing:
            zspace, answer = inferencer_losses(model, batch, encoded.z, embeddings, bool(weights.answer))
            if weights.zspace:
                terms["zspace"] = zspace
            if answer is not None:
                terms["answer"] = answer
        if weights.autoregressive and quantizing and model.autoregressive is not None:
            terms["autoregressive"] = autoregressive_loss(
                model, batch.tokens, batch.cu_segments, ratio, encoded.z, embeddings
            )
        terms["total"] = terms["reconstruction"] + sum(
            getattr(weights, name) * value for name, value in terms.items() if hasattr(weights, name)
        )
        return terms, encoded

    def _draw_levels(self, segments: int, probability: float, draw) -> torch.Tensor | None:
        count = self.model.config.num_codebooks
        if probability <= 0 or count == 1:
            return None
        device = draw.device
        fewer = torch.rand(segments, generator=draw, device=device) < probability
        chosen = torch.randint(1, count + 1, (segments,), generator=draw, device=device)
        return torch.where(fewer, chosen, count).to(torch.int32)

    def _target_mass(self, batch: Batch, ratio: torch.Tensor) -> torch.Tensor:
        bits = self.model.surprisal(batch.tokens, batch.cu_segments)
        cu_tokens = batch.cu_segments[batch.cu_sections.long()]
        section = sequence_of_row(cu_tokens, len(batch.tokens))
        return surprisal_mass(bits, ratio[section], cu_tokens, self.model.config)

    def _decompress(self, batch: Batch, encoded: Encoding, embeddings, phase: Phase, draw) -> torch.Tensor:
        model = self.model

        def logits_of(tokens):
            inputs = model.decoder_inputs(embeddings, encoded.z, tokens, batch.cu_segments)
            return model.adapted.logits(model.decompressor_hidden(inputs)).float()

        tokens = batch.tokens
        if phase.noise > 0:
            random = torch.randint(
                model.adapted.embedding.weight.shape[0], tokens.shape, generator=draw, device=tokens.device
            )
            swap = torch.rand(tokens.shape, generator=draw, device=tokens.device) < phase.noise
            tokens = torch.where(swap, random, tokens)
        if phase.sampling > 0:
            with torch.no_grad():
                own = logits_of(tokens).argmax(-1)
            swap = torch.rand(tokens.shape, generator=draw, device=tokens.device) < phase.sampling
            tokens = torch.where(swap, own, tokens)
        return logits_of(tokens)


def blend_vectors(encoded: Encoding, blend: float) -> torch.Tensor:
    """The vectors the decompressor sees: latents (0), straight-through code vectors (1), or a mixture."""
    latents = encoded.quantized.latents
    if blend >= 1:
        return encoded.quantized.quantized
    if blend <= 0:
        return latents
    return latents + blend * (encoded.quantized.quantized - latents).detach()


def length_loss(raw_mass: torch.Tensor, section: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """(E[K]/N − 1/r)², the mean over sections; E[K] = Σ mass is differentiable where an integer K is not."""
    sums = torch.zeros_like(ratio).index_add_(0, section, raw_mass)
    counts = torch.zeros_like(ratio).index_add_(0, section, torch.ones_like(raw_mass))
    return (sums / counts.clamp(min=1) - 1 / ratio).square().mean()


def usage_loss(latents: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """log V minus the entropy of the mean soft assignment, the mean over levels, in nats.

    The soft assignment is a softmax over negative squared distances, so the histogram has a gradient
    to the latents and the codebooks; a histogram of hard codes has none.
    """
    residual, total = latents.float(), latents.new_zeros((), dtype=torch.float32)
    for codebook in codebooks.float():
        distance = torch.cdist(residual, codebook).square()
        nearest = distance.min(dim=1)
        temperature = nearest.values.mean().detach().clamp(min=1e-6)
        share = torch.softmax(-distance / temperature, dim=1).mean(0)
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        total = total + math.log(len(codebook)) - entropy
        residual = residual - codebook[nearest.indices].detach()
    return total / len(codebooks)
