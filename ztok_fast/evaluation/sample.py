"""Texts to evaluate on, as tokens, and what the bare base model makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ztok_fast.codec.layout import offsets, position_in_sequence, sequence_of_row, split_segments
from ztok_fast.codec.passes import BATCH_TOKENS, Tokens, batches, pack_tokens

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec


class Sample:
    """Texts as a codec sees them. All tensors are on the CPU.

    Args:
        codec: the codec; texts: with at least one token each; documents: their tokens.

    Attributes:
        sections: the documents cut as the codec cuts them; counts: sections of every document.
        tokens: int64 ``[T]``, all of them; position: int64 ``[T]``, in the segment.
        cu_segments: int32 ``[S + 1]``; cu_sections: int32, offsets of the sections in segments.
        own_bits: fp32 ``[T]``, −log2 p under the bare base model, each segment on its own.
        base_guesses: int64 ``[T]``, what the base model would write given the segment's true prefix; -1 at the first.
    """

    def __init__(self, codec: ZTokCodec, texts: Sequence[str], documents: Sequence[Tokens]) -> None:
        self.codec, self.texts, self.documents = codec, list(texts), list(documents)
        limit = codec.config.section_tokens
        self.sections = [d[i : i + limit] for d in self.documents for i in range(0, len(d), limit)]
        self.counts = [-(-len(d) // limit) for d in self.documents]
        self.tokens = pack_tokens(self.documents, "cpu")
        segments, own = split_segments([len(s) for s in self.sections], codec.config.segment_length)
        self.cu_segments = offsets(torch.tensor(segments))
        self.cu_sections = offsets(torch.tensor(own))
        self.position = position_in_sequence(self.cu_segments, len(self.tokens))
        self.vocabulary = len(codec.model.adapted.embedding.weight)
        codec._engines.use()
        self.own_bits, self.base_guesses = self._base()

    @classmethod
    def of_texts(cls, codec: ZTokCodec, texts: Sequence[str]) -> Sample:
        """The sample of texts, those without a token left out.

        Raises:
            ValueError: no text has a token.
        """
        if isinstance(texts, (str, bytes)):
            raise ValueError(f"texts: expected a list of strings, got one {type(texts).__name__}; put it in a list")
        kept = [(text, tokens) for text, tokens in zip(texts, codec.tokenize(texts)) if len(tokens)]
        if not kept:
            raise ValueError(f"texts: expected at least one with a token, got none in {len(texts)}")
        return cls(codec, [text for text, _ in kept], [tokens for _, tokens in kept])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def vocabulary_bits(self) -> float:
        """Bits of a token that is written down as it is: log2 of the base model's vocabulary."""
        return math.log2(self.vocabulary)

    @property
    def segment(self) -> torch.Tensor:
        """The segment of every token, int64 ``[T]``."""
        return sequence_of_row(self.cu_segments, len(self))

    @property
    def document(self) -> torch.Tensor:
        """The document of every token, int64 ``[T]``."""
        return sequence_of_row(offsets(torch.tensor([len(d) for d in self.documents])), len(self))

    @property
    def section(self) -> torch.Tensor:
        """The section of every token, int64 ``[T]``."""
        return sequence_of_row(offsets(torch.tensor([len(s) for s in self.sections])), len(self))

    @torch.inference_mode()
    def _base(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Bits and guesses of the bare base model.

        Nothing is before the first token of a segment. It is counted at the mean of all others: less than any model
        without context needs, so that own bits, and with them efficiency, are on the low side.
        """
        model = self.codec.model
        bits, guesses = torch.zeros(len(self)), torch.full((len(self),), -1, dtype=torch.int64)
        bounds = self.cu_segments.tolist()
        for batch in batches(self.cu_segments.diff().tolist(), BATCH_TOKENS):
            rows = slice(bounds[batch.start], bounds[batch.stop])
            cu = (self.cu_segments[batch.start : batch.stop + 1] - rows.start).to(model.device)
            tokens, position = self.tokens[rows].to(model.device), self.position[rows].to(model.device)
            hidden = model.runtime.hidden(
                model.adapted.embedding(tokens), position, cu, int(cu.diff().max()), adapter=None
            )
            step = model.rows_at_once
            for start in range(0, len(tokens) - 1, step):
                stop = min(start + step, len(tokens) - 1)
                logits = model.runtime.logits(hidden[start:stop]).float()
                own = slice(rows.start + start + 1, rows.start + stop + 1)
                loss = torch.nn.functional.cross_entropy(logits, tokens[start + 1 : stop + 1], reduction="none")
                bits[own], guesses[own] = loss.cpu() / math.log(2), logits.argmax(-1).cpu()
        first = self.position == 0
        guesses[first] = -1
        bits[first] = bits[~first].mean() if (~first).any() else self.vocabulary_bits
        return bits, guesses
