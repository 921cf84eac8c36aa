"""The trainable model: a frozen base under three adapters, halting, quantiser, embeddings and heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ztok_fast.codec.adapters import AdaptedBase
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.emission import HaltingHead, fixed_mass, scale_to_budget, unit_lengths
from ztok_fast.codec.layout import block_bounds, expand_ranges, offsets, position_in_sequence, sequence_of_row
from ztok_fast.codec.runtime import EngineRuntime, FloatRuntime, Runtime
from ztok_fast.codec.zspace import ZSpaceHead
from ztok_fast.codec.ztokens import ZTokens
from ztok_fast.ops import QuantizedUnits, halting_units, quantize_ragged, ragged_gather, ragged_layout
from ztok_fast.profiling import HALTING, QUANTISE, stage

MASS_GRADIENT = 0.05
"""Share of the integration weights' gradient that reaches the halting mass."""


COPY_LOGIT = 45.0
"""Logit that a token's own embedding, copied whole, would add to its token at the start of training."""

LOGITS_AT_ONCE = 1 << 24
"""Most logits computed at once where no gradient is needed: 64 MB in float32."""


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


@dataclass
class DecoderInputs:
    """Packed decompressor sequences: Z prefix, start row, text; ``text_rows`` are the rows that predict.

    ``logit_bias`` is what the copy path adds to their hidden states, ``[T, D]``, where the codec has one.
    """

    embeds: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    text_rows: torch.Tensor
    logit_bias: torch.Tensor | None


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


def root_mean_square(weight: torch.Tensor) -> float:
    """Of all elements, the same on every machine and in any order: it scales what exact documents are decoded by.

    The squares are rounded to multiples of 2^-32 of the largest and summed as integers.
    """
    weight = weight.detach().double()
    largest = weight.abs().max().item()
    if not largest:
        return 0.0
    total = int(((weight / largest).square() * 2.0**32).round().long().sum())
    return largest * math.sqrt(total / 2.0**32 / weight.numel())


class ZTokModel(nn.Module):
    """Base, adapters and the codec's own small modules.

    Everything a codec saves is in `codec_state`; the base's weights are never part of it.
    """

    def __init__(self, base: PreTrainedModel, config: ZTokConfig) -> None:
        super().__init__()
        self.config = config
        self.adapted = AdaptedBase(base, config)
        self.float_runtime = FloatRuntime(self.adapted)
        self.engine: EngineRuntime | None = None
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

    @property
    def runtime(self) -> Runtime:
        """What runs the base model: the engine where the codec has one and no gradient is wanted, else transformers."""
        return self.float_runtime if self.engine is None or torch.is_grad_enabled() else self.engine

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

    def unit_positions(self, z: ZTokens) -> torch.Tensor:
        """Position, in its segment, that stands for each unit (as ``z_position`` says), int64 ``[K]``."""
        lengths = z.unit_lengths
        start = offsets(lengths).long()[:-1] - z.cu_text.long()[sequence_of_row(z.cu_segments, z.ztokens)]
        shift = {"start": torch.zeros_like(start), "center": lengths.long() // 2, "end": lengths.long() - 1}
        return start + shift[self.config.z_position]

    def prefix(self, z: ZTokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The Z-tokens that each segment's decompressor sees: those of its context segments, then its own.

        Returns:
            rows int64 ``[R]`` into the Z-tokens, their position ids ``[R]``, int32 offsets ``[S + 1]``.
        """
        config, cu_units = self.config, z.cu_segments.long()
        segments = torch.arange(len(cu_units) - 1, device=cu_units.device)
        begin = torch.maximum(z.first_segment, segments - config.context_segments)
        rows, cu_prefix = expand_ranges(cu_units[begin], cu_units[1:])
        own = self.unit_positions(z)
        segment_of_unit = sequence_of_row(cu_units, z.ztokens)
        back = sequence_of_row(cu_prefix, len(rows)) - segment_of_unit[rows]
        return rows, own[rows] + (config.context_segments - back) * config.segment_length, cu_prefix

    def decoder_inputs(self, embeddings, z: ZTokens, tokens, cu_segments) -> DecoderInputs:
        """Teacher-forced decompressor inputs of packed segments (see `DecoderInputs`).

        Args:
            embeddings: ``[K, D]`` of the Z-tokens ``z``; tokens int64 ``[T]``, the text before each prediction;
                cu_segments: int32 ``[S + 1]``, token offsets of the segments (``z.cu_text``).
        """
        total = len(tokens)
        rows, z_positions, cu_prefix = self.prefix(z)
        position = position_in_sequence(cu_segments, total)
        previous = self.adapted.embedding(torch.roll(tokens, 1))
        text = torch.where((position == 0)[:, None], self.start_embedding.to(previous.dtype), previous)
        conditioning, logit_bias = self.conditioning(embeddings, z.unit_lengths, total)
        if conditioning is not None:
            text = text + conditioning.to(text.dtype)
        joined = ragged_gather([embeddings.to(text.dtype), text], [rows, None], [cu_prefix, cu_segments])
        layout = ragged_layout([cu_prefix, cu_segments], [len(rows), total])
        position_ids = layout.place([z_positions, position + self.config.context_segments * self.config.segment_length])
        longest = int(layout.cu_seqlens.diff().max()) if len(layout.cu_seqlens) > 1 else 0
        return DecoderInputs(
            joined.values, position_ids, layout.cu_seqlens, longest, layout.destinations[1], logit_bias
        )

    def conditioning(self, embeddings, lengths, total: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the units add to the ``total`` packed text rows that write them.

        Returns:
            The conditioning ``[total, D]`` of the input rows (``None`` without ``unit_conditioning``), and the logit
            bias ``[total, D]``, added to the last hidden states (``None`` without ``copy_path``).
        """
        if self.offset_embedding is None or self.unbinding is None:
            return None, None
        unit, gate, offset = self.gate_of_token(lengths, total)
        unbound = embeddings[unit] * self.unbinding[gate]
        if self.copy_gains is None:
            return unbound + self.offset_embedding(offset), None
        logit_bias = self.copy_scale * self.copy_gains[0] * unbound
        return self.copy_gains[1] * unbound + self.offset_embedding(offset), logit_bias

    def decompressor_hidden(self, inputs: DecoderInputs) -> torch.Tensor:
        """Hidden states ``[T, D]`` of the rows that predict the text tokens."""
        hidden = self.runtime.hidden(
            inputs.embeds, inputs.position_ids, inputs.cu_seqlens, inputs.max_length, adapter="decompressor"
        )
        hidden = hidden[inputs.text_rows]
        return hidden if inputs.logit_bias is None else hidden + inputs.logit_bias.to(hidden.dtype)

    @property
    def rows_at_once(self) -> int:
        """Rows whose logits are computed at once where no gradient is needed: few where the vocabulary is large."""
        return max(1, min(4096, LOGITS_AT_ONCE // len(self.adapted.model.get_output_embeddings().weight)))

    # The bare base model

    @torch.no_grad()
    def surprisal(self, tokens: torch.Tensor, cu_segments: torch.Tensor) -> torch.Tensor:
        """Bits of every token under the bare base model, each segment on its own, fp32 ``[T]``.

        The first token of a segment has nothing before it; it gets the mean of all others that are given.
        """
        total = len(tokens)
        position = position_in_sequence(cu_segments, total)
        hidden = self.runtime.hidden(
            self.adapted.embedding(tokens), position, cu_segments, int(cu_segments.diff().max()), adapter=None
        )
        bits = torch.zeros(total, device=tokens.device)
        step = self.rows_at_once
        for start in range(0, total - 1, step):
            stop = min(start + step, total - 1)
            loss = torch.nn.functional.cross_entropy(
                self.runtime.logits(hidden[start:stop]).float(), tokens[start + 1 : stop + 1], reduction="none"
            )
            bits[start + 1 : stop + 1] = loss / 0.6931471805599453
        first = position == 0
        if (~first).any():
            bits[first] = bits[~first].mean()
        return bits

    # What a codec saves

    def codec_state(self) -> dict[str, torch.Tensor]:
        """Adapters, codebooks, projections and heads by name; nothing of the base."""
        return {**self.trainable_parameters()}

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        adapters = {f"adapters.{name}": p for name, p in self.adapted.adapter_parameters()}
        own = {n: p for n, p in self.named_parameters() if not n.startswith("adapted.")}
        return {**adapters, **own}
