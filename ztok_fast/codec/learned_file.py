"""Files of learned units, read block by block in constant memory, or one document of many.

docs/file-format.md lays out the bytes. Only the codec that made a file reads it: the file has no settings beside the
codec's identity. What a record holds is `ztok_fast.codec.learned_records`; `ztok_fast.codec.learned_writer` writes it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ztok_fast.codec import learned_records as records
from ztok_fast.codec.batch_checks import check_fits
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.container import (
    IDENTITY_BYTES,
    LEARNED_FORM,
    Head,
    Index,
    check_end,
    has_documents,
    read_header,
    read_records,
)
from ztok_fast.codec.container_file import DocumentFile, open_file
from ztok_fast.codec.container_writer import BLOCK_BYTES, BLOCK_PARTS
from ztok_fast.codec.documents import HASH_BYTES, digest_of
from ztok_fast.codec.errors import ZBatchError, ZFileError
from ztok_fast.codec.varint import varint
from ztok_fast.codec.zbatch import PRECISIONS, ZBatch
from ztok_fast.codec.ztokens import ZTokens, concatenate, no_documents

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec

_FORMAT = b"ztok learned 1"
_HALF = HASH_BYTES // 2


@dataclass(frozen=True)
class Reading:
    """What reads the files of a codec.

    Attributes:
        config, fingerprint: the codec's; vocabulary: tokens of its base model.
        read_prior: (precision, streams of documents, their text tokens) -> their Z-tokens, as `slot_prior.decode`.
    """

    config: ZTokConfig
    fingerprint: str
    vocabulary: int
    read_prior: Callable[[str, Sequence[bytes], Sequence[int]], ZTokens]

    @classmethod
    def of(cls, codec: ZTokCodec) -> Reading:
        """What reads the files of a loaded codec."""
        vocabulary = codec.model.adapted.embedding.weight.shape[0]
        return cls(codec.config, codec.fingerprint, vocabulary, codec.streams.read)

    def precision_of(self, header: bytes) -> str:
        """That of the file with this header; `ZFileError` unless it is this codec's."""
        identity = header[-IDENTITY_BYTES:]
        for precision in PRECISIONS:
            if identity_of(self.fingerprint, precision) == identity:
                return precision
        raise ZFileError(
            f"expected Z-tokens of the codec with fingerprint {self.fingerprint[:16]}..., got those of another one "
            f"(identity {identity.hex()})"
        )

    def batch(self, ztokens: ZTokens, stored: Sequence[records.Stored], precision: str) -> ZBatch:
        """Documents that have been read, once all of them are checked."""
        batch = ZBatch(
            **vars(ztokens),
            documents=[own.info for own in stored],
            codec_fingerprint=self.fingerprint,
            codebook_size=self.config.codebook_size,
            max_unit_length=self.config.max_unit_length,
            precision=precision,
        ).validate()
        check_fits(batch, self.config, self.vocabulary)
        return batch


class LearnedFile(DocumentFile[ZBatch]):
    """A sequence of the documents of a file of learned units; use it in a ``with`` statement, or close it.

    Opening reads the index and the heads of the last records. A document takes the heads of at most 256 records and the
    decoding of its own. `parts` gives a document in parts, a batch of one document each: a text that a stream wrote
    has one for each MiB, any other text has one.

    Args:
        path: the file; codec: that made it.

    Raises:
        ZFileError: the file is truncated, damaged, of another kind or of another codec.
    """

    form = LEARNED_FORM

    def __init__(self, path: str | Path, codec: ZTokCodec) -> None:
        self.codec, self._reading = codec, Reading.of(codec)
        super().__init__(path)

    def __getitem__(self, number: int) -> ZBatch:
        """The Z-tokens of document ``number``, from 0; negative ones count from the end.

        Raises:
            IndexError: there is no such document.
            ZFileError: it is damaged, or it has several `parts`.
        """
        parts = list(self.parts(number))
        if len(parts) > 1:
            raise ZFileError(f"{self.path}, document {number}: {_several(len(parts))}")
        return parts[0]

    def text(self, number: int) -> Iterator[bytes]:
        """The text of a document, part by part.

        Raises:
            IndexError, ZFileError: as of `parts`. ExactMismatchError: as of `ZTokCodec.decompress`.
        """
        for part in self.parts(number):
            yield from self.codec.decompress_bytes(part)

    def _check_header(self, stream: BinaryIO) -> None:
        self._precision = self._reading.precision_of(read_header(stream, LEARNED_FORM))

    def _read(self, stream: BinaryIO, index: Index, end: int) -> Iterator[ZBatch]:
        for block, _ in _read_blocks(stream, self._reading, self._precision, index, end, whole=False):
            yield from block


def identity_of(fingerprint: str, precision: str) -> bytes:
    """8 bytes that name all that reading depends on: codec, precision and format."""
    return hashlib.sha256(_FORMAT + f"{fingerprint} {precision}".encode()).digest()[:IDENTITY_BYTES]


def read_units(path: str | Path, reading: Reading) -> Iterator[tuple[ZBatch, list[bool]]]:
    """The parts of all documents in order, block by block: a document each, and whether it goes on in the next.

    Raises:
        ZFileError: the file is missing, truncated, foreign, of another codec, altered or inconsistent; the message
            names the file and says which.
    """
    path = Path(path)
    with open_file(path) as stream:
        try:
            header, index = read_header(stream, LEARNED_FORM), Index()
            precision = reading.precision_of(header)
            if has_documents(header):
                end = os.fstat(stream.fileno()).st_size
                yield from _read_blocks(stream, reading, precision, index, end, whole=True)
            else:
                nothing = no_documents(reading.config.num_codebooks, reading.config.emission == "slots")
                yield reading.batch(nothing, [], precision), []
            check_end(stream, header, index)
        except ZFileError as error:
            raise ZFileError(f"{path}: {error}") from error


def load_units(path: str | Path, reading: Reading) -> ZBatch:
    """All documents of a file.

    Raises:
        ZFileError: as of `read_units`; or a document has several parts, which `LearnedFile` reads.
    """
    blocks, going = [], 0
    for block, goes_on in read_units(path, reading):
        going += sum(goes_on)
        blocks.append(block)
    if going:
        raise ZFileError(f"{path}: {_several(going + 1)}")
    return ZBatch.concatenate(blocks)


def _several(parts: int) -> str:
    return (
        f"expected documents of one part, got {parts} parts of one: a text of so many MiB is read part by part "
        "(LearnedFile, ztok decompress)"
    )


def digest_for(kind: int, length: int, payload: bytes, text: bytes) -> bytes:
    """The hash of a record: the original's where it comes back, else half of it behind half a hash of the record.

    Args:
        text: the original; ``b""`` where nothing is known of it.
    """
    digest = digest_of(text)
    return digest if records.is_exact(kind) else _check(kind, length, payload, digest[:_HALF]) + digest[:_HALF]


def is_of(head: Head, text: bytes) -> bool:
    """Whether a record is one of a text."""
    digest = digest_of(text)
    return head.digest == digest if records.is_exact(head.kind) else head.digest[_HALF:] == digest[:_HALF]


def _check(kind: int, length: int, payload: bytes, text: bytes) -> bytes:
    return digest_of(bytes([kind]) + varint(length) + text + payload)[:_HALF]


def _read_blocks(
    stream: BinaryIO, reading: Reading, precision: str, index: Index, end: int, whole: bool
) -> Iterator[tuple[ZBatch, list[bool]]]:
    """The blocks of the records from here on, as of `read_units`; other arguments as of `read_records`."""
    block: list[records.Stored] = []
    goes_on: list[bool] = []
    size = first = 0
    for head in read_records(stream, index, end, LEARNED_FORM, whole):
        number = index.records - 1
        own = _read_record(stream, number, head, reading.config)
        # Generated Z-tokens have no text, and a damaged file may state little of it.
        own_size = max(head.length, own.info.tokens)
        if block and (size + own_size > BLOCK_BYTES or len(block) == BLOCK_PARTS):
            yield _decode(block, first, precision, reading), goes_on
            block, goes_on, size, first = [], [], 0, number
        block.append(own)
        goes_on.append(head.goes_on)
        size += own_size
    yield _decode(block, first, precision, reading), goes_on


def _read_record(stream: BinaryIO, number: int, head: Head, config: ZTokConfig) -> records.Stored:
    payload = stream.read(head.stored)
    try:
        own = records.read_document(head.kind, head.length, payload, head.digest, config)
    except (ZFileError, ZBatchError) as error:
        raise ZFileError(f"record {number}: {error}") from error
    half = head.digest[:_HALF]
    if not records.is_exact(head.kind) and _check(head.kind, head.length, payload, head.digest[_HALF:]) != half:
        raise ZFileError(f"record {number}: expected the hash that the file states, got another: it is damaged")
    return own


def _decode(block: Sequence[records.Stored], first: int, precision: str, reading: Reading) -> ZBatch:
    """The documents of a block whose records are from number ``first`` on."""
    parts: list[ZTokens | None] = [None] * len(block)
    under = [i for i, own in enumerate(block) if own.coding == records.PRIOR]
    if under:
        together = reading.read_prior(
            precision, [block[i].stream for i in under], [block[i].info.tokens for i in under]
        )
        for place, i in enumerate(under):
            parts[i] = together.part(place)
    for i, own in enumerate(block):
        if own.coding != records.PRIOR:
            try:
                parts[i] = records.read_ztokens(own, reading.config)
            except ZFileError as error:
                raise ZFileError(f"record {first + i}: {error}") from error
    try:
        return reading.batch(concatenate([own for own in parts if own is not None]), block, precision)
    except ZBatchError as error:
        raise ZFileError(f"records from {first} on: {error}") from error
