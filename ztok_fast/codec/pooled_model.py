"""Pooled Z-tokens: halting cuts the text into units, and the sum over a unit is quantised in residual levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.emission import HaltingHead, fixed_mass, scale_to_budget, unit_lengths
from ztok_fast.codec.layout import block_bounds, offsets, position_in_sequence, sequence_of_row
from ztok_fast.codec.segment_model import SegmentModel, root_mean_square
from ztok_fast.codec.zspace import ZSpaceHead
from ztok_fast.codec.ztokens import ZTokens, one_each
from ztok_fast.ops import QuantizedUnits, halting_units, quantize_ragged
from ztok_fast.profiling import HALTING, QUANTISE, stage

MASS_GRADIENT = 0.05
"""Share of the integration weights' gradient that reaches the halting mass."""


COPY_LOGIT = 45.0
"""Logit that a token's own embedding, copied whole, would add to its token at the start of training."""


@dataclass
class Encoding:
    """Segments after compression: their Z-tokens, and what training needs besides.

    Attributes:
        z: the Z-tokens.
        quantized: vectors ``[K, d_z]``, latents, losses, usage and units; its codes are those of ``z``.
        raw_mass: halting mass before scaling, ``[T]``; mass: after, ``[T]``.
    """

    z: ZTokens
    quantized: QuantizedUnits
    raw_mass: torch.Tensor
    mass: torch.Tensor


def binding_start(config: ZTokConfig, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where binding starts: a projection ``[d_z, D]`` and gates ``[max_unit_length², D]``.

    The latent is split into L blocks, each fed by its own part of the hidden width, and a gate says which blocks a
    token of a unit writes to: alone it writes to all of them, in a unit of n tokens to every n-th, and where more
    tokens than blocks share a unit their signs differ. Tokens so stay apart in the sum over the unit (tensor
    products and holographic representations bind alike: Smolensky 1990, Plate 1995), and one codebook of a level
    first answers for one block. Compressor and decompressor start with the same gates and projections that are
    each other's transpose: what goes in comes out from the first step on. Training moves all of it.
    """
    levels, latent, longest = config.num_codebooks, config.latent_dim, config.max_unit_length
    rows, columns = block_bounds(latent, levels), block_bounds(width, levels)
    projection = torch.zeros(latent, width)
    gates = torch.zeros(longest, longest, width)
    for block in range(levels):
        own_rows, own_columns = slice(*rows[block]), slice(*columns[block])
        part = projection[own_rows, own_columns]
        if part.numel():
            torch.nn.init.orthogonal_(part)
        # The same signs whatever the unit's length: a token looks the same to the block's codebook.
        signs = torch.where(torch.rand(-(-longest // levels), own_columns.stop - own_columns.start) < 0.5, -1.0, 1.0)
        for length in range(1, longest + 1):
            for offset in range(length):
                if offset % levels == block % min(length, levels):
                    gates[length - 1, offset, own_columns] = signs[offset // levels]
    return projection, gates.reshape(longest * longest, width)


class PooledModel(SegmentModel):
    """Z-tokens that pool the tokens of their unit in one vector, quantised in residual levels."""

    zspace: ZSpaceHead

    def __init__(self, base: PreTrainedModel, config: ZTokConfig) -> None:
        super().__init__(base, config)
        width, latent = self.adapted.hidden_size, config.latent_dim
        rms = root_mean_square(self.adapted.embedding.weight)
        self.halting = HaltingHead(width)
        projection, gates = binding_start(config, width)
        self.end_projection = nn.Parameter(torch.zeros_like(projection))
        self.mean_projection = nn.Parameter(projection.clone())
        self.binding = nn.Parameter(gates)
        # The embedding, normalised, is one of as many points as there are tokens, which a codebook can hold exactly;
        # the hidden state spreads each point out, so it starts small.
        self.hidden_gain = nn.Parameter(torch.tensor(0.02))
        self.embedding_gain = nn.Parameter(torch.tensor(1.0))
        self.codebooks = nn.Parameter(torch.randn(config.num_codebooks, config.codebook_size, latent) * 0.1)
        self.budget_embedding = nn.Parameter(torch.zeros(2, width))
        self.z_projection = nn.Linear(latent, width)
        with torch.no_grad():
            self.z_projection.weight.copy_(projection.T * rms * (width / latent) ** 0.5)
        nn.init.zeros_(self.z_projection.bias)
        self.length_embedding = nn.Embedding(config.max_unit_length + 1, width)
        nn.init.normal_(self.length_embedding.weight, std=0.3 * rms)
        self.start_embedding = nn.Parameter(torch.randn(width) * rms)
        self.offset_embedding = self.unbinding = None
        if config.unit_conditioning:
            self.offset_embedding = nn.Embedding(config.max_unit_length, width)
            nn.init.normal_(self.offset_embedding.weight, std=0.3 * rms)
            self.unbinding = nn.Parameter(2.0 * gates)
        # Gains of the unbound Z-token at the decompressor's output and input. With the direct path the input
        # starts low, which leaves the base model's own prediction nearly as it was.
        self.copy_gains = nn.Parameter(torch.tensor([1.0, 0.25])) if config.copy_path else None
        self.copy_scale = COPY_LOGIT / (rms**2 * width)
        self.zspace = ZSpaceHead(width, config, rms)
        # The head of a compressor that writes its Z-tokens one by one.
        self.autoregressive = ZSpaceHead(width, config, rms) if config.emission == "stop" else None

    # Compression

    def encode(
        self,
        tokens: torch.Tensor,
        cu_segments: torch.Tensor,
        cu_documents: torch.Tensor,
        ratio: torch.Tensor,
        levels: torch.Tensor | None = None,
        fixed_units: bool | None = None,
        mass: torch.Tensor | None = None,
    ) -> Encoding:
        """Compress packed segments.

        Args:
            tokens: int64 ``[T]`` text tokens of all segments.
            cu_segments: int32 ``[S + 1]`` token offsets of the segments.
            cu_documents: int32 ``[G + 1]`` offsets, in segments, of the documents, each with a budget of its own.
            ratio: fp32 ``[G]``, text tokens per Z-token asked of each document.
            levels: int32 ``[S]`` residual levels to use, ``None`` for all.
            fixed_units: units of exactly ``ratio`` tokens instead of learned ones; ``None`` as configured.
            mass: halting mass ``[T]`` to use instead of the predicted one (used to warm up training).
        """
        config = self.config
        total = len(tokens)
        embeds, conditioned, row_ratio = self.compressor_inputs(tokens, cu_segments, cu_documents, ratio)
        hidden = self.runtime.hidden(
            conditioned,
            position_in_sequence(cu_segments, total),
            cu_segments,
            config.segment_length,
            adapter="compressor",
            layers=self.adapted.compressor_layers,
        )
        with stage(HALTING):
            raw_mass = self.halting(hidden, row_ratio, config.max_unit_length)
            if config.emission == "fixed" if fixed_units is None else fixed_units:
                scaled = fixed_mass(row_ratio)
            else:
                scaled = scale_to_budget(
                    raw_mass if mass is None else mass, ratio, cu_segments, cu_documents, config.max_unit_length
                )
            units = halting_units(scaled, cu_segments)
            lengths = unit_lengths(units, int(units.cu_units[-1]))
        with stage(QUANTISE):
            unit, gate, _ = self.gate_of_token(lengths, total)
            # Every token of a unit weighs the same and none reaches into the next unit: what a code has to tell apart
            # is then tokens and not their shares. The gradient of the shares still goes to the mass, damped, since
            # reconstruction pulls on it far harder than the terms that say where Z-tokens go.
            even = 1.0 / lengths[unit].to(units.weights.dtype)
            shares = torch.stack([even, torch.zeros_like(even)], dim=1)
            shares = shares + MASS_GRADIENT * (units.weights - units.weights.detach())
            words = nn.functional.normalize(embeds.float(), dim=-1) * embeds.shape[1] ** 0.5
            rows = (self.hidden_gain * hidden + self.embedding_gain * words.to(hidden.dtype)) * self.binding[gate]
            quantized = quantize_ragged(
                rows,
                None,
                None,
                self.end_projection,
                self.mean_projection,
                self.codebooks,
                levels,
                total_units=len(lengths),
                units=units._replace(weights=shares),
            )
        return Encoding(ZTokens(quantized.codes, lengths, units.cu_units, cu_documents), quantized, raw_mass, scaled)

    def compressor_inputs(
        self, tokens, cu_segments, cu_documents, ratio
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs of text rows packed as in `encode`.

        Returns:
            Embeddings ``[T, D]``, the same conditioned on the ratio, and the ratio asked of each row ``[T]``.
        """
        document_of_segment = sequence_of_row(cu_documents, len(cu_segments) - 1)
        row_ratio = ratio[document_of_segment[sequence_of_row(cu_segments, len(tokens))]]
        embeds = self.adapted.embedding(tokens)
        features = torch.stack([torch.ones_like(row_ratio), row_ratio.log2() - 1], dim=1).to(embeds.dtype)
        return embeds, embeds + features @ self.budget_embedding.to(embeds.dtype), row_ratio

    def gate_of_token(self, lengths: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit, row of the gate table and offset in the unit of ``total`` packed tokens, int64 each."""
        cu_text = offsets(lengths)
        unit = sequence_of_row(cu_text, total)
        offset = position_in_sequence(cu_text, total)
        return unit, (lengths.long()[unit] - 1) * self.config.max_unit_length + offset, offset

    # Z-tokens as inputs

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """Sum of the code vectors, ``[K, d_z]``; a code of -1 is a dropped level and adds nothing."""
        vectors = self.codebooks.new_zeros(len(codes), self.codebooks.shape[2])
        # One addition after another: the sum has the same bits whatever the number of rows.
        for level, own in enumerate(codes.unbind(1)):
            vectors = vectors + self.codebooks[level][own.clamp(min=0).long()] * (own >= 0)[:, None]
        return vectors

    def z_embeddings(self, vectors: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Input embeddings ``[K, D]`` of Z-tokens with code vectors ``[K, d_z]`` and unit lengths ``[K]``."""
        return self.runtime.linear(self.z_projection, vectors) + self.length_embedding(lengths.long())

    def embed(self, z: ZTokens, vectors: torch.Tensor | None = None) -> torch.Tensor:
        return self.z_embeddings(self.dequantize(z.codes) if vectors is None else vectors, z.unit_lengths)

    def conditioning(self, embeddings, z: ZTokens, total: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """See `SegmentModel`: the first is ``None`` without ``unit_conditioning``, the second without ``copy_path``."""
        if self.offset_embedding is None or self.unbinding is None:
            return None, None
        unit, gate, offset = self.gate_of_token(z.unit_lengths, total)
        unbound = embeddings[unit] * self.unbinding[gate]
        if self.copy_gains is None:
            return unbound + self.offset_embedding(offset), None
        logit_bias = self.copy_scale * self.copy_gains[0] * unbound
        return self.copy_gains[1] * unbound + self.offset_embedding(offset), logit_bias

    def next_row(self, hidden: torch.Tensor, **settings) -> tuple[ZTokens, torch.Tensor, torch.Tensor]:
        codes, lengths, drawn = self.zspace.select(hidden, self.codebooks, **settings)
        ends = drawn if settings["allow_end"] else self.zspace.end_mass(hidden, self.codebooks)
        z = one_each(codes, lengths)
        return z, ends.double(), self.embed(z)

    def zspace_loss(self, hidden: torch.Tensor, z: ZTokens, is_end: torch.Tensor) -> torch.Tensor:
        codes = z.codes.new_full((len(is_end), z.num_codebooks), -1)
        lengths = z.unit_lengths.new_ones(len(is_end))
        codes[~is_end], lengths[~is_end] = z.codes, z.unit_lengths
        return self.zspace.loss(hidden, codes, lengths, is_end, self.codebooks)
