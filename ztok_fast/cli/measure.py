"""What compressing and decompressing one text came to: the numbers of the demo."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from ztok_fast.cli.common import tokenize
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.layout import offsets, split_segments
from ztok_fast.codec.passes import teacher_forced
from ztok_fast.codec.slots import written_tokens
from ztok_fast.codec.zbatch import ZBatch


@dataclass
class Measurement:
    """One text there and back.

    Attributes:
        tokens: of the text, N; z: its Z-tokens; written: what the decompressor wrote, N tokens.
        predicted: what it would have written given the true prefix.
        residual_bits: bits per token that the decompressor still needs, given the Z-tokens and the true prefix.
        surprisal: bits of every token under the bare base model, fp32 ``[N]``, each segment on its own.
        compress_seconds, decompress_seconds: wall-clock time.
    """

    tokens: list[int]
    z: ZBatch
    written: list[int]
    predicted: list[int]
    residual_bits: float
    surprisal: torch.Tensor
    compress_seconds: float
    decompress_seconds: float

    @property
    def unit_lengths(self) -> list[int]:
        return self.z.unit_lengths.tolist()

    @property
    def wrong(self) -> list[bool]:
        """For every token whether another one was written."""
        return [a != b for a, b in zip(self.written, self.tokens)]

    @property
    def free_running(self) -> float:
        """Share of tokens that came back."""
        return 1 - sum(self.wrong) / len(self.tokens)

    @property
    def teacher_forced(self) -> float:
        """Share of tokens that would come back given the true prefix."""
        return sum(a == b for a, b in zip(self.predicted, self.tokens)) / len(self.tokens)

    @property
    def base_bits(self) -> float:
        """The bare base model's bits per token: what its own coding of the text would take."""
        return float(self.surprisal.mean())

    @property
    def efficiency(self) -> float:
        """(own bits − residual bits) / rate: how much of what the Z-tokens cost they save. 1 is the bound."""
        return (self.base_bits - self.residual_bits) / self.z.rate

    @property
    def guessed(self) -> list[bool]:
        """For every token whether the decompressor guesses it; all of them where Z-tokens name none."""
        if self.z.slot_offsets is None:
            return [True] * len(self.tokens)
        return (written_tokens(self.z) < 0).tolist()

    def surprisal_by_length(self) -> tuple[float, float, float]:
        """Mean surprisal of the tokens in units shorter than the budget and in longer ones (NaN where there are
        none), and the correlation of a unit's length with the mean surprisal of its tokens (NaN without spread)."""
        lengths = self.z.unit_lengths.long()
        of_unit = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        sums = torch.zeros(len(lengths)).index_add_(0, of_unit, self.surprisal)
        budget = self.z.documents[0].budget
        token_lengths = lengths[of_unit]
        short, long = self.surprisal[token_lengths < budget], self.surprisal[token_lengths > budget]
        correlation = math.nan
        if len(lengths) > 1 and len(lengths.unique()) > 1:
            correlation = float(torch.corrcoef(torch.stack([lengths.float(), sums / lengths]))[0, 1])
        return _mean(short), _mean(long), correlation


def measure(codec: ZTokCodec, text: str, ratio: float) -> Measurement:
    """Compress ``text`` at ``ratio``, decompress it and compare.

    Raises:
        ValueError: the text is empty, or the codec cannot give the ratio.
    """
    tokens = tokenize(codec, [text])[0]
    if not tokens:
        raise ValueError("text: expected at least one token to measure, got an empty text")
    started = time.perf_counter()
    z = codec.compress([text], ratio)
    compressed = time.perf_counter()
    written = codec.decompress_tokens(z)[0]
    decompressed = time.perf_counter()
    device, limit = codec.model.device, codec.config.section_tokens
    sections, predicted = [tokens[i : i + limit] for i in range(0, len(tokens), limit)], []
    encoded, _ = z.sections(codec.config.section_segments)
    nats = 0.0
    for index, section in enumerate(sections):
        own = encoded.part(index).to(device)
        found, _, loss = teacher_forced(codec.model, own, torch.tensor(section, device=device))
        predicted += found.tolist()
        nats += float(loss.sum())
    return Measurement(
        tokens,
        z,
        written,
        predicted,
        nats / math.log(2) / len(tokens),
        torch.cat([surprisal(codec, section) for section in sections]),
        compressed - started,
        decompressed - compressed,
    )


@torch.inference_mode()
def surprisal(codec: ZTokCodec, tokens: list[int]) -> torch.Tensor:
    """Bits of every token under the bare base model, fp32 ``[N]`` on the CPU, each segment on its own."""
    device = codec.model.device
    segments, _ = split_segments([len(tokens)], codec.config.segment_length)
    bits = codec.model.surprisal(torch.tensor(tokens, device=device), offsets(torch.tensor(segments, device=device)))
    return bits.float().cpu()


def _mean(values: torch.Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan
