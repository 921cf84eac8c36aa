"""Z-tokens of packed documents: the one form in which codes, unit lengths and offsets pass through the codec."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from ztok_fast.codec.documents import DocumentInfo
from ztok_fast.codec.layout import expand_ranges, offsets, sequence_of_row

Own = TypeVar("Own", bound="ZDocuments")
"""A kind of documents, of which parts are of the same kind."""


@dataclass(eq=False)
class ZTokens:
    """Codes of packed documents without padding; all tensors are on one device.

    A document is cut into segments, a segment into units, and each unit has one Z-token. Where the context and the
    budget matter, the documents are *sections*: consecutive segments of a text that share a budget and nothing with
    other sections (`sections`).

    Attributes:
        codes: int32 ``[K, L]``, the codes of all Z-tokens, document after document; -1 at levels that are not used.
        unit_lengths: int32 ``[K]``, text tokens that each Z-token stands for.
        cu_segments: int32 ``[n_segments + 1]``, Z rows of every segment.
        cu_documents: int32 ``[n_documents + 1]``, segments of every document. An empty one has none.
        slot_offsets: int32 ``[K, L]``, where in its unit the token of each code stands, -1 at slots that are not used;
            ``None`` where codes are not slots (see `ztok_fast.codec.slots`).
    """

    codes: torch.Tensor
    unit_lengths: torch.Tensor
    cu_segments: torch.Tensor
    cu_documents: torch.Tensor
    slot_offsets: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.cu_documents) - 1

    @property
    def num_codebooks(self) -> int:
        return self.codes.shape[1]

    @property
    def ztokens(self) -> int:
        """Z-tokens of all documents, K."""
        return self.codes.shape[0]

    @property
    def cu_ztokens(self) -> torch.Tensor:
        """Z rows of every document: int32 ``[n_documents + 1]``."""
        return self.cu_segments[self.cu_documents.long()]

    @property
    def cu_text(self) -> torch.Tensor:
        """Text tokens of every segment: int32 ``[n_segments + 1]``."""
        return offsets(self.unit_lengths)[self.cu_segments.long()]

    @property
    def first_segment(self) -> torch.Tensor:
        """The first segment of the document that each segment belongs to: int64 ``[n_segments]``."""
        return self.cu_documents.long()[sequence_of_row(self.cu_documents, len(self.cu_segments) - 1)]

    def to(self, device) -> ZTokens:
        tensors = [t.to(device) for t in (self.codes, self.unit_lengths, self.cu_segments, self.cu_documents)]
        places = None if self.slot_offsets is None else self.slot_offsets.to(device)
        return ZTokens(tensors[0], tensors[1], tensors[2], tensors[3], places)

    def _offsets_at(self, rows) -> torch.Tensor | None:
        return None if self.slot_offsets is None else self.slot_offsets[rows]

    def part(self, index: int) -> ZTokens:
        """Document ``index`` alone; codes and unit lengths are views."""
        first, last = self.cu_documents[index : index + 2].tolist()
        cu = self.cu_segments[first : last + 1]
        begin, end = int(cu[0]), int(cu[-1])
        one = torch.tensor([0, last - first], dtype=torch.int32, device=cu.device)
        own = slice(begin, end)
        return ZTokens(self.codes[own], self.unit_lengths[own], cu - begin, one, self._offsets_at(own))

    def select(self, documents: Sequence[int]) -> ZTokens:
        """Some of the documents, in the order given; one may come several times."""
        chosen = torch.tensor(documents, dtype=torch.int64, device=self.codes.device)
        bounds, cu = self.cu_documents.long(), self.cu_segments.long()
        segments, cu_documents = expand_ranges(bounds[chosen], bounds[chosen + 1])
        rows, cu_segments = expand_ranges(cu[segments], cu[segments + 1])
        return ZTokens(self.codes[rows], self.unit_lengths[rows], cu_segments, cu_documents, self._offsets_at(rows))

    def sections(self, segments: int) -> tuple[ZTokens, list[int]]:
        """The same rows with every document cut into sections of at most ``segments`` segments.

        Returns:
            The sections as documents of their own, and the number of sections of every document.
        """
        bounds, edges, counts = self.cu_documents.tolist(), [0], []
        for begin, end in zip(bounds[:-1], bounds[1:]):
            own = [min(edge + segments, end) for edge in range(begin, end, segments)]
            edges += own
            counts.append(len(own))
        cu_documents = torch.tensor(edges, dtype=torch.int32, device=self.codes.device)
        return ZTokens(self.codes, self.unit_lengths, self.cu_segments, cu_documents, self.slot_offsets), counts

    def joined(self, counts: Sequence[int]) -> ZTokens:
        """The inverse of `sections`: every ``counts[i]`` consecutive documents become one."""
        bounds = offsets(torch.tensor(counts, dtype=torch.int64, device=self.codes.device)).long()
        cu_documents = self.cu_documents[bounds]
        return ZTokens(self.codes, self.unit_lengths, self.cu_segments, cu_documents, self.slot_offsets)

    def keys(self) -> list[tuple[bytes, bytes, bytes]]:
        """Of every document a key that only documents with the same Z-tokens share (tensors on the CPU)."""
        cu, bounds = self.cu_segments.tolist(), self.cu_documents.tolist()
        said = self.codes if self.slot_offsets is None else torch.cat([self.codes, self.slot_offsets], dim=1)
        codes, lengths = said.contiguous().numpy(), self.unit_lengths.contiguous().numpy()
        rows = self.cu_segments.diff().contiguous().numpy()
        return [
            (codes[cu[a] : cu[b]].tobytes(), lengths[cu[a] : cu[b]].tobytes(), rows[a:b].tobytes())
            for a, b in zip(bounds[:-1], bounds[1:])
        ]


@dataclass(eq=False, kw_only=True)
class ZDocuments(ZTokens):
    """Z-tokens with what else is known of each document; a sequence of batches of one document.

    Attributes:
        documents: what else is known of each document.
    """

    documents: list[DocumentInfo]

    @property
    def tokens(self) -> int:
        """Text tokens of all documents, N."""
        return sum(document.tokens for document in self.documents)

    @property
    def achieved_ratio(self) -> float:
        """Text tokens per Z-token over all documents, N / K; NaN without Z-tokens."""
        return self.tokens / self.ztokens if self.ztokens else math.nan

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self: Own, index: int) -> Own:
        """Document ``index`` as a batch of one; its tensors are views of this batch's."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected a document from {-len(self)} to {len(self) - 1}, got {index}")
        index %= len(self)
        return replace(self, **vars(self.part(index)), documents=[self.documents[index]])

    def __iter__(self: Own) -> Iterator[Own]:
        return (self[index] for index in range(len(self)))


def concatenate(parts: Sequence[ZTokens]) -> ZTokens:
    """The documents of several parts of one kind with equally many codebooks, in order; at least one part."""
    places = [part.slot_offsets for part in parts if part.slot_offsets is not None]
    return ZTokens(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.unit_lengths for part in parts]),
        offsets(torch.cat([part.cu_segments.diff() for part in parts])),
        offsets(torch.cat([part.cu_documents.diff() for part in parts])),
        torch.cat(places) if places else None,
    )


def one_each(codes, unit_lengths, slot_offsets=None) -> ZTokens:
    """Z-tokens that are a document each."""
    cu = torch.arange(len(codes) + 1, dtype=torch.int32, device=codes.device)
    return ZTokens(codes, unit_lengths.int(), cu, cu, slot_offsets)


def no_documents(num_codebooks: int, slots: bool = False) -> ZTokens:
    """No document at all, on the CPU; ``slots``: its codes would be slots."""
    none, start = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    codes = none.reshape(0, num_codebooks)
    return ZTokens(codes, none, start, start, codes if slots else None)
