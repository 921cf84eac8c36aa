"""What a reader reads of a text, by way: the whole of it, or as many positions as its Z-tokens take."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ztok_fast.codec.slot_model import SlotModel
from ztok_fast.codec.slots import written_tokens
from ztok_fast.codec.text import detokenize
from ztok_fast.evaluation.readers import Reader
from ztok_fast.evaluation.sample import Sample

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec
    from ztok_fast.codec.zbatch import ZBatch

FULL, DECOMPRESSED, ZTOKENS = "full text", "decompressed", "Z-tokens"
WRITTEN, SURPRISING, RARE = "written tokens", "surprising words", "rare words"
POOLED, TRUNCATED, NOTHING = "mean pooling", "truncation", "no context"
ANSWER_WAYS = (FULL, DECOMPRESSED, ZTOKENS, WRITTEN, SURPRISING, RARE, POOLED, TRUNCATED, NOTHING)
"""What is read of a text to answer a question about it; docs/evaluation.md says what each is."""

_WORD = re.compile(r"\S+")


def answer_ways_of(codec: ZTokCodec) -> tuple[str, ...]:
    """Those of `ANSWER_WAYS` that a codec has."""
    return tuple(way for way in ANSWER_WAYS if way != WRITTEN or isinstance(codec.model, SlotModel))


class Contexts:
    """What a reader reads of each text.

    Args:
        sample: the texts as the codec sees them; each must have a token.
        z: their Z-tokens.
    """

    def __init__(self, sample: Sample, z: ZBatch, reader: Reader) -> None:
        self.sample, self.z, self.reader = sample, z, reader
        model = sample.codec.model
        with torch.inference_mode():
            self._rows, cu = model.inferencer_rows(z.to(model.device))
        self.positions = cu.diff().tolist()
        """Rows that the codec's inferencer reads of every text; the other ways have no more."""

    def rows(self, way: str) -> list[torch.Tensor]:
        """Input embeddings ``[k, D]`` of every text; of `ZTOKENS` those that the codec's inferencer reads."""
        if way == ZTOKENS:
            return list(self._rows.split(self.positions))
        if way == POOLED:
            return [mean_pooled(self.reader.embed(_ids(tokens)), k) for tokens, k in zip(self._tokens, self.positions)]
        return [self.reader.embed(_ids(tokens)) for tokens in self.tokens(way)]

    def tokens(self, way: str) -> list[Sequence[int]]:
        """The reader's tokens of every text, of the ways that read some."""
        if way == FULL:
            return self._tokens
        if way == DECOMPRESSED:
            return self.reader.tokenize(self.decompressed)
        if way == TRUNCATED:
            found = self._tokens
        elif way == WRITTEN:
            found = self.reader.tokenize(self._written_texts())
        elif way == NOTHING:
            return [[] for _ in self.positions]
        else:
            found = self._chosen(_surprise(self.sample) if way == SURPRISING else _rarity(self.sample.texts))
        return [own[:k] for own, k in zip(found, self.positions)]

    @cached_property
    def decompressed(self) -> list[str]:
        """The texts as they come back."""
        return self.sample.codec.decompress(self.z)

    @cached_property
    def _tokens(self) -> list[Sequence[int]]:
        return self.reader.tokenize(self.sample.texts)

    def _written_texts(self) -> list[str]:
        codec = self.sample.codec
        named = written_tokens(self.z).split([len(d) for d in self.sample.documents])
        return [detokenize(codec.tokenizer, own[own >= 0].tolist()).decode("utf-8", "replace").strip() for own in named]

    def _chosen(self, prices: list[list[float]]) -> list[Sequence[int]]:
        """The dearest words of every text that fit its positions, in their order."""
        chosen = []
        for text, own, room in zip(self.sample.texts, prices, self.positions):
            words = _WORD.findall(text)
            sizes = [len(tokens) for tokens in self.reader.tokenize([f" {word}" for word in words])]
            kept = []
            for index in sorted(range(len(words)), key=lambda i: -own[i]):
                if sizes[index] <= room:
                    kept.append(index)
                    room -= sizes[index]
            chosen.append(" ".join(words[index] for index in sorted(kept)))
        return self.reader.tokenize(chosen)


def mean_pooled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The means of ``count`` stretches of rows ``[n, D]``, of lengths that differ by one at most; at most n of them."""
    return torch.stack([part.mean(0) for part in rows.tensor_split(min(count, len(rows)))]) if len(rows) else rows


def _ids(tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64)


def _surprise(sample: Sample) -> list[list[float]]:
    """Bits of every word under the bare base model of the codec: of all tokens that have a character of it."""
    found = []
    for text, bits in zip(sample.texts, sample.own_bits.split([len(d) for d in sample.documents])):
        places = sample.codec.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        own = [0.0] * len(text)
        for (start, stop), cost in zip(places, bits.tolist()):
            for character in range(start, stop):
                own[character] += cost / (stop - start)
        found.append([sum(own[word.start() : word.end()]) for word in _WORD.finditer(text)])
    return found


def _rarity(texts: Sequence[str]) -> list[list[float]]:
    """How rare every word is among all words of the texts, in bits."""
    words = [[word.lower() for word in _WORD.findall(text)] for text in texts]
    counts = Counter(word for own in words for word in own)
    return [[math.log2(counts.total() / counts[word]) for word in own] for own in words]
