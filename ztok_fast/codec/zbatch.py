"""Compressed documents in memory: packed codes with their offsets, and what is known of each document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ztok_fast.codec.documents import MAX_CODEBOOKS, SHA256, DocumentInfo, is_integer
from ztok_fast.codec.errors import ZBatchError
from ztok_fast.codec.slot_coding import encode_slots
from ztok_fast.codec.ztokens import ZDocuments, concatenate

FLOAT = "float"
PRECISIONS = ("int8", "float32", FLOAT)
"""Arithmetic of the base model: the engine's two, with the same bits everywhere, and that of transformers' modules."""


@dataclass(eq=False, kw_only=True)
class ZBatch(ZDocuments):
    """Compressed documents: their Z-tokens on the CPU, packed without padding, and what else is known of them.

    Attributes:
        codes: int32 ``[K, L]``, the codes of all Z-tokens, document after document; each in
            [0, V), or -1 at the levels that the document does not use.
        unit_lengths: int32 ``[K]``, text tokens that each Z-token stands for, 1 to ``max_unit_length``.
        cu_segments: int32 ``[n_segments + 1]``, Z rows of every segment.
        cu_documents: int32 ``[n_documents + 1]``, segments of every document. An empty one has none.
        documents: what else is known of each document.
        codec_fingerprint: 64 hexadecimal digits that name the codec.
        codebook_size: entries of one codebook, V.
        max_unit_length: longest unit that the codec makes.
        precision: arithmetic of the base model that made it, one of `PRECISIONS`. Exact documents need the same.
    """

    codec_fingerprint: str
    codebook_size: int
    max_unit_length: int
    precision: str = FLOAT

    @property
    def rate(self) -> float:
        """Bits per text token of codes and unit lengths, K·(L·log2 V + log2 max_unit_length) / N; NaN for N = 0.

        L is the number of levels that a document uses. Where codes are slots: log2 V for each slot that is filled,
        and for where they stand what they take in a file.
        """
        if self.slot_offsets is not None:
            places = 8 * len(encode_slots(self, self.codebook_size, self.max_unit_length, codes=False))
            bits = int((self.codes >= 0).sum()) * math.log2(self.codebook_size) + places
            return bits / self.tokens if self.tokens else math.nan
        rows = self.cu_ztokens.diff().tolist()
        bits = sum(
            count * (document.levels * math.log2(self.codebook_size) + math.log2(self.max_unit_length))
            for count, document in zip(rows, self.documents)
        )
        return bits / self.tokens if self.tokens else math.nan

    @property
    def rate_exact(self) -> float:
        """As `rate`, with the bytes of exact mode's corrections."""
        stored = sum(d.corrections.stored_bytes for d in self.documents if d.corrections is not None)
        return self.rate + 8 * stored / self.tokens if self.tokens else math.nan

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ZBatch):
            return NotImplemented
        settings = ("documents", "codec_fingerprint", "codebook_size", "max_unit_length", "precision")
        tensors = ("codes", "unit_lengths", "cu_segments", "cu_documents", "slot_offsets")
        return all(getattr(self, name) == getattr(other, name) for name in settings) and all(
            _same(getattr(self, name), getattr(other, name)) for name in tensors
        )

    @staticmethod
    def concatenate(batches: Sequence[ZBatch]) -> ZBatch:
        """The documents of several batches of one codec, in order.

        Raises:
            ZBatchError: no batch is given, or they are of different codecs.
        """
        if not batches:
            raise ZBatchError("batches: expected at least one, got none")
        first = batches[0]
        for batch in batches:
            first.check_codec(batch.codec_fingerprint)
            for name in ("num_codebooks", "codebook_size", "max_unit_length", "precision"):
                if getattr(batch, name) != getattr(first, name):
                    raise ZBatchError(
                        f"batches: expected {name} {getattr(first, name)} in all, got {getattr(batch, name)}"
                    )
        return replace(
            first,
            **vars(concatenate(batches)),
            documents=[document for batch in batches for document in batch.documents],
        )

    def check_codec(self, fingerprint: str) -> None:
        """Raise `ZBatchError` unless the codec with this fingerprint made the batch."""
        if fingerprint != self.codec_fingerprint:
            raise ZBatchError(
                f"codec: expected the one with fingerprint {self.codec_fingerprint[:16]}..., which compressed this, "
                f"got {fingerprint[:16]}..."
            )

    def validate(self) -> ZBatch:
        """Check that all parts fit together; returns the batch itself.

        Raises:
            ZBatchError: names the part, what was expected and what it is.
        """
        self._validate_settings()
        for name, dims in (("codes", 2), ("unit_lengths", 1), ("cu_segments", 1), ("cu_documents", 1)):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor) or value.dtype != torch.int32 or value.dim() != dims:
                got = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise ZBatchError(f"{name}: expected an int32 tensor of {dims} dimension(s), got {got}")
            if value.device.type != "cpu":
                raise ZBatchError(f"{name}: expected a tensor on the CPU, got one on {value.device}")
        if not 1 <= self.num_codebooks <= MAX_CODEBOOKS:
            raise ZBatchError(f"codes: expected 1 to {MAX_CODEBOOKS} codebooks, got shape {list(self.codes.shape)}")
        if self.slot_offsets is not None and (
            self.slot_offsets.shape != self.codes.shape or self.slot_offsets.dtype != torch.int32
        ):
            raise ZBatchError(f"slot_offsets: expected int32 {list(self.codes.shape)}, got {self.slot_offsets.shape}")
        if len(self.unit_lengths) != self.ztokens:
            raise ZBatchError(
                f"unit_lengths: expected one for each of {self.ztokens} Z-tokens, got {len(self.unit_lengths)}"
            )
        _validate_offsets("cu_segments", self.cu_segments, self.ztokens, "Z-tokens")
        _validate_offsets("cu_documents", self.cu_documents, len(self.cu_segments) - 1, "segments")
        if len(self.documents) != len(self.cu_documents) - 1:
            raise ZBatchError(f"documents: expected {len(self.cu_documents) - 1}, got {len(self.documents)}")
        if self.ztokens:
            low, high = int(self.unit_lengths.min()), int(self.unit_lengths.max())
            if low < 1 or high > self.max_unit_length:
                raise ZBatchError(f"unit_lengths: expected 1 to {self.max_unit_length}, got {low} to {high}")
        bounds = self.cu_ztokens.tolist()
        for index, document in enumerate(self.documents):
            try:
                self._validate_document(document, slice(bounds[index], bounds[index + 1]))
            except ZBatchError as error:
                raise ZBatchError(f"document {index}: {error}") from error
        return self

    def _validate_settings(self) -> None:
        if not isinstance(self.codec_fingerprint, str) or not SHA256.fullmatch(self.codec_fingerprint):
            raise ZBatchError(
                f"codec_fingerprint: expected 64 lower-case hexadecimal digits, got {self.codec_fingerprint!r}"
            )
        if self.precision not in PRECISIONS:
            raise ZBatchError(f"precision: expected one of {PRECISIONS}, got {self.precision!r}")
        for name, low, high in (("codebook_size", 2, 1 << 31), ("max_unit_length", 1, (1 << 31) - 1)):
            if not is_integer(getattr(self, name), low, high):
                raise ZBatchError(f"{name}: expected an integer from {low} to {high}, got {getattr(self, name)!r}")

    def _validate_document(self, document: DocumentInfo, rows: slice) -> None:
        document.validate(self.num_codebooks)
        covered = int(self.unit_lengths[rows].sum())
        if covered != document.tokens:
            raise ZBatchError(f"unit_lengths: expected to cover its {document.tokens} text tokens, got {covered}")
        if self.slot_offsets is not None:
            _validate_slots(self.codes[rows], self.slot_offsets[rows], self.unit_lengths[rows], self.codebook_size)
            return
        used, dropped = self.codes[rows, : document.levels], self.codes[rows, document.levels :]
        if used.numel() and not (0 <= int(used.min()) and int(used.max()) < self.codebook_size):
            raise ZBatchError(
                f"codes: expected 0 to {self.codebook_size - 1} at its {document.levels} levels, "
                f"got {int(used.min())} to {int(used.max())}"
            )
        if bool((dropped != -1).any()):
            raise ZBatchError(f"codes: expected -1 past its {document.levels} levels, got other values")


def _validate_slots(codes, places, lengths, codebook_size: int) -> None:
    used = codes >= 0
    if codes.numel() and (int(codes.min()) < -1 or int(codes.max()) >= codebook_size):
        raise ZBatchError(
            f"codes: expected -1 to {codebook_size - 1} in slots, got {int(codes.min())} to {int(codes.max())}"
        )
    if bool((used[:, 1:] & ~used[:, :-1]).any()):
        raise ZBatchError("codes: expected the first slots of a Z-token to be filled first, got a gap")
    if bool((places[~used] != -1).any()):
        raise ZBatchError("slot_offsets: expected -1 at slots that are not filled, got other values")
    rising = places[:, 1:] > places[:, :-1]
    if bool((used[:, 1:] & ~rising).any()) or bool((places[used] < 0).any()):
        raise ZBatchError("slot_offsets: expected places that rise from 0 on in a unit, got others")
    if bool((places >= lengths[:, None]).any()):
        raise ZBatchError("slot_offsets: expected places in the unit, got one past its length")


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _validate_offsets(name: str, offsets: torch.Tensor, total: int, things: str) -> None:
    if not len(offsets) or int(offsets[0]) != 0 or int(offsets[-1]) != total:
        ends = [int(offsets[0]), int(offsets[-1])] if len(offsets) else "none"
        raise ZBatchError(f"{name}: expected offsets from 0 to the {total} {things}, got {ends}")
    if bool((offsets.diff() < 0).any()):
        raise ZBatchError(f"{name}: expected non-decreasing offsets, got {int((offsets.diff() < 0).sum())} that fall")
