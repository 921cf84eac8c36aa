"""The numbers of an evaluation, from what was stored and what came back."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict, dataclass

import torch

from ztok_fast.codec.text import detokenize
from ztok_fast.evaluation.sample import Sample

LONG_DOCUMENT = 150
"""Text tokens from which on a document's ratio is expected near the one asked for."""

NEAR = 0.1
"""How far a document's ratio may be from the one asked for, as a share of it."""


@dataclass
class Outcome:
    """What one way to store a sample came to.

    Attributes:
        bits: all that the decompressor is told, as stored; plain_bits: the same, every code at its full width.
        loss: fp32 ``[T]``, −log2 p of every token given what is stored and the true prefix.
        predicted: int64 ``[T]``, what is written given the true prefix, -1 for nothing; free: the same given what has
            been written before.
        told: bool ``[T]``, tokens that are stored as they are; ``None`` where there is no such thing.
        ztokens: of every document; ``None`` where there are none.
    """

    bits: float
    plain_bits: float
    loss: torch.Tensor
    predicted: torch.Tensor
    free: torch.Tensor
    told: torch.Tensor | None = None
    ztokens: torch.Tensor | None = None


@dataclass(frozen=True)
class Evaluation:
    """How well one way to store texts restores them. Rates and bits are per text token; docs/evaluation.md has more.

    Attributes:
        way: how the texts were stored; asked: the ratio that was asked for.
        documents, segments, tokens, bytes: of the texts.
        rate: bits of everything the decompressor is told, as stored; plain_rate: with every code at its full width.
        vocabulary_bits: log2 of the vocabulary; own_bits: H0, the bare base model's bits for the text.
        residual_bits: H(x | z), the decompressor's bits for the text given what is stored.
        teacher_forced: share of tokens right given the true prefix; free_running: given what was written before.
        bleu: BLEU-4 of the texts that came back, 0 to 100; ``None`` without sacrebleu.
        exact_segments: share of segments that came back whole.
        told: share of tokens that are stored as they are, ``None`` where the codec has no such thing.
        ratio: text tokens per Z-token; near: share of the documents of `LONG_DOCUMENT` tokens or more (there are
            ``long_documents``) whose ratio is within `NEAR` of the one asked for. ``None`` where there is none.
    """

    way: str
    asked: float
    documents: int
    segments: int
    tokens: int
    bytes: int
    rate: float
    plain_rate: float
    vocabulary_bits: float
    own_bits: float
    residual_bits: float
    teacher_forced: float
    free_running: float
    bleu: float | None
    exact_segments: float
    told: float | None
    ratio: float | None
    near: float | None
    long_documents: int

    @property
    def efficiency(self) -> float:
        """Bits of the text that the stored bits save, (H0 − H(x | z)) / rate. NaN at a rate of 0.

        At most 1 where the base model is the best account of the text; docs/evaluation.md says where not.
        """
        return (self.own_bits - self.residual_bits) / self.rate if self.rate else math.nan

    @property
    def total_bits(self) -> float:
        """Rate and residual bits: what an exact copy takes by this way."""
        return self.rate + self.residual_bits

    def to_dict(self) -> dict:
        """All numbers, those that follow from others too."""
        return {**asdict(self), "efficiency": self.efficiency, "total_bits": self.total_bits}


def score(sample: Sample, way: str, asked: float, outcome: Outcome) -> Evaluation:
    """The numbers of one outcome."""
    total, right = len(sample), outcome.free == sample.tokens
    wrong = torch.zeros(len(sample.cu_segments) - 1).index_add_(0, sample.segment, (~right).float())
    lengths = torch.tensor([len(d) for d in sample.documents])
    ratio = near = None
    long = lengths >= LONG_DOCUMENT
    if outcome.ztokens is not None:
        ratio = total / int(outcome.ztokens.sum())
        if long.any():
            off = (lengths / outcome.ztokens)[long].double() / asked - 1
            near = float((off.abs() <= NEAR).double().mean())
    return Evaluation(
        way=way,
        asked=asked,
        documents=len(sample.documents),
        segments=len(sample.cu_segments) - 1,
        tokens=total,
        bytes=sum(len(text.encode("utf-8", "surrogatepass")) for text in sample.texts),
        rate=outcome.bits / total,
        plain_rate=outcome.plain_bits / total,
        vocabulary_bits=sample.vocabulary_bits,
        own_bits=float(sample.own_bits.double().mean()),
        residual_bits=float(outcome.loss.double().mean()),
        teacher_forced=float((outcome.predicted == sample.tokens).double().mean()),
        free_running=float(right.double().mean()),
        bleu=bleu(sample, outcome.free),
        exact_segments=float((wrong == 0).double().mean()),
        told=None if outcome.told is None else float(outcome.told.double().mean()),
        ratio=ratio,
        near=near,
        long_documents=int(long.sum()),
    )


def has_bleu() -> bool:
    """Whether the package sacrebleu is installed."""
    return importlib.util.find_spec("sacrebleu") is not None


def bleu(sample: Sample, free: torch.Tensor) -> float | None:
    """BLEU-4 of the texts that the tokens ``free`` stand for, 0 to 100; ``None`` without sacrebleu."""
    if not has_bleu():
        return None
    import sacrebleu

    written = [
        detokenize(sample.codec.tokenizer, own[own >= 0].tolist()).decode("utf-8", "replace")
        for own in free.split([len(d) for d in sample.documents])
    ]
    return float(sacrebleu.corpus_bleu(written, [sample.texts]).score)
