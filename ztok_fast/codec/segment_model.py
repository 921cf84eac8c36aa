"""What the models of a codec share: the frozen base under its adapters, and the decompressor's rows of a segment."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ztok_fast.codec.adapters import AdaptedBase
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.layout import expand_ranges, offsets, position_in_sequence, sequence_of_row
from ztok_fast.codec.runtime import EngineRuntime, FloatRuntime, Runtime
from ztok_fast.codec.slot_space import SlotSpaceHead
from ztok_fast.codec.zspace import ZSpaceHead
from ztok_fast.codec.ztokens import ZTokens
from ztok_fast.ops import ragged_gather, ragged_layout

LOGITS_AT_ONCE = 1 << 24
"""Most logits computed at once where no gradient is needed: 64 MB in float32."""


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


class SegmentModel(nn.Module):
    """A frozen base, its adapters, and what a decompressor reads: Z-tokens, a start row, and the text so far.

    Everything a codec saves is in `codec_state`; the base's weights are never part of it.
    """

    start_embedding: nn.Parameter
    zspace: ZSpaceHead | SlotSpaceHead

    def __init__(self, base: PreTrainedModel, config: ZTokConfig) -> None:
        super().__init__()
        self.config = config
        self.adapted = AdaptedBase(base, config)
        self.float_runtime = FloatRuntime(self.adapted)
        self.engine: EngineRuntime | None = None

    @property
    def runtime(self) -> Runtime:
        """What runs the base model: the engine where the codec has one and no gradient is wanted, else transformers."""
        return self.float_runtime if self.engine is None or torch.is_grad_enabled() else self.engine

    @property
    def device(self) -> torch.device:
        return self.start_embedding.device

    # What the kinds of Z-tokens differ in

    def embed(self, z: ZTokens, vectors: torch.Tensor | None = None) -> torch.Tensor:
        """Input embeddings ``[K, D]`` of Z-tokens; ``vectors``: ``[K, d_z]`` in place of their code vectors."""
        raise NotImplementedError

    def conditioning(self, embeddings, z: ZTokens, total: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the Z-tokens add to the ``total`` packed text rows that write them.

        Args:
            embeddings: ``[K, D]``, those of the Z-tokens ``z``.

        Returns:
            The conditioning ``[total, D]`` of the input rows, and the logit bias ``[total, D]``, added to the last
            hidden states; each ``None`` where the codec has none.
        """
        raise NotImplementedError

    def written(self, z: ZTokens) -> torch.Tensor | None:
        """The text tokens that the Z-tokens name, int64 ``[T]``, -1 at others; ``None`` where they name none."""
        return None

    @property
    def steps_per_ztoken(self) -> int:
        """Rows of the inferencer that write one Z-token."""
        return 1

    def inferencer_rows(self, z: ZTokens, embeddings: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the inferencer reads of documents: rows ``[R, D]``, and int32 ``[n_documents + 1]``, those of each.

        Args:
            embeddings: ``[K, D]``, those of the Z-tokens ``z``; ``None``: they are made.
        """
        return self.embed(z) if embeddings is None else embeddings, z.cu_ztokens

    def next_row(
        self, hidden: torch.Tensor, *, temperature, top_p, seed, row_ids, step, allow_end
    ) -> tuple[ZTokens, torch.Tensor, torch.Tensor]:
        """What comes next in every document: a Z-token, or, where they take several rows, one slot as a Z-token.

        Args:
            hidden: ``[B, D]``, states of the documents' last rows; the others are those of `ZSpaceHead.select`.

        Returns:
            The Z-tokens, each as a document; fp64 ``[B]``: where ``allow_end``, 1 in rows that drew end-of-Z, else 0,
            without it the probability of end-of-Z; and the input rows ``[B, D]`` of what comes next.
        """
        raise NotImplementedError

    def zspace_loss(self, hidden: torch.Tensor, z: ZTokens, is_end: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats, the mean over rows ``[N, D]``, of what comes next in Z-tokens ``z`` and of end-of-Z.

        Args:
            is_end: bool ``[N]``, rows whose target is end-of-Z; the others have those of ``z``, in order.
        """
        raise NotImplementedError

    # The decompressor's rows

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
        conditioning, logit_bias = self.conditioning(embeddings, z, total)
        if conditioning is not None:
            text = text + conditioning.to(text.dtype)
        joined = ragged_gather([embeddings.to(text.dtype), text], [rows, None], [cu_prefix, cu_segments])
        layout = ragged_layout([cu_prefix, cu_segments], [len(rows), total])
        position_ids = layout.place([z_positions, position + self.config.context_segments * self.config.segment_length])
        longest = int(layout.cu_seqlens.diff().max()) if len(layout.cu_seqlens) > 1 else 0
        return DecoderInputs(
            joined.values, position_ids, layout.cu_seqlens, longest, layout.destinations[1], logit_bias
        )

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
