"""Files of learned units: documents as Z-tokens, each in a record, with the header, hashes and index of coded units.

docs/file-format.md lays out the bytes. Only the codec that made a file reads it: the file has no settings beside the
codec's identity. What a record holds is `ztok_fast.codec.learned_records`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ztok_fast.codec import learned_records as records
from ztok_fast.codec.batch_checks import check_fits
from ztok_fast.codec.coded_records import (
    IDENTITY_BYTES,
    LEARNED_MAGIC,
    LEARNED_VERSION,
    Head,
    Index,
    check_end,
    header_with_index,
    read_header,
    walk,
)
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.documents import DocumentInfo, digest_of
from ztok_fast.codec.errors import ZBatchError, ZFileError
from ztok_fast.codec.varint import varint
from ztok_fast.codec.zbatch import PRECISIONS, ZBatch
from ztok_fast.codec.ztokens import ZTokens, concatenate, no_documents
from ztok_fast.files import replace_atomically

ReadPrior = Callable[[str, Sequence[bytes], Sequence[int]], ZTokens]
"""(precision, streams of documents, their text tokens) -> their Z-tokens, as `slot_prior.decode`"""

_FORMAT = b"ztok learned 1"
NO_DOCUMENT = 1
"""In the header's third byte: a file that was cut off is not to look like one without documents."""


def identity_of(fingerprint: str, precision: str) -> bytes:
    """8 bytes that name all that reading depends on: codec, precision and format."""
    return hashlib.sha256(_FORMAT + f"{fingerprint} {precision}".encode()).digest()[:IDENTITY_BYTES]


def is_learned_file(path: str | Path) -> bool:
    """Whether a file begins as one of learned units does."""
    with open(path, "rb") as stream:
        return stream.read(len(LEARNED_MAGIC)) == LEARNED_MAGIC


def save_units(z: ZBatch, path: str | Path, config: ZTokConfig, prior: Sequence[bytes] | None = None) -> None:
    """Write a valid batch of a codec of these settings; an older file is replaced only once the new one is whole.

    Args:
        prior: of each document the stream of `slot_prior`, stored where that is smaller.

    Raises:
        ZBatchError: the batch does not fit the codec.
        ZFileError: the path does not end in ``.ztok``.
    """
    path = Path(path)
    if path.suffix != ".ztok":
        raise ZFileError(f"path: expected a file name that ends in .ztok, got {path}")
    check_fits(z.validate(), config)
    header = (
        LEARNED_MAGIC
        + bytes([LEARNED_VERSION << 4 | NO_DOCUMENT * (not len(z))])
        + identity_of(z.codec_fingerprint, z.precision)
    )
    index, data = Index(), [header]
    for number, one in enumerate(z):
        info = one.documents[0]
        kind, payload = records.write_document(one, config, None if prior is None else prior[number])
        digest, follows = _digest(kind, info, payload), number < len(z) - 1
        head = Head(kind, info.byte_length or 0, len(payload), digest, False, follows)
        data.append(head.to_bytes(number, number) + payload)
        index.add(head, len(data[-1]))
    if tail := index.to_bytes(header):
        data = [header_with_index(header), *data[1:], tail]
    with replace_atomically(path) as temporary:
        temporary.write_bytes(b"".join(data))


def load_units(
    path: str | Path, config: ZTokConfig, fingerprint: str, vocabulary: int, read_prior: ReadPrior
) -> ZBatch:
    """Read and check a file of a codec.

    Args:
        config, fingerprint: the codec's; vocabulary: tokens of its base model.
        read_prior: reads Z-tokens that are coded under the codec's model.

    Raises:
        ZFileError: the file is missing, truncated, foreign, of another codec, altered or inconsistent; the message
            names the file and says which.
    """
    path = Path(path)
    if not path.is_file():
        raise ZFileError(f"{path}: expected an existing .ztok file, got none")
    try:
        precision, stored = _read(path, config, fingerprint)
        batch = ZBatch(
            **vars(_ztokens(stored, config, precision, read_prior)),
            documents=[own.info for own in stored],
            codec_fingerprint=fingerprint,
            codebook_size=config.codebook_size,
            max_unit_length=config.max_unit_length,
            precision=precision,
        ).validate()
        check_fits(batch, config, vocabulary)
        return batch
    except (ZFileError, ZBatchError) as error:
        raise ZFileError(f"{path}: {error}") from error


def stated_documents(path: str | Path) -> int:
    """How many documents a file states, which is known without its codec.

    Raises:
        ZFileError: it is no whole file of learned units.
    """
    with open(path, "rb") as stream:
        try:
            header, _ = read_header(stream, LEARNED_MAGIC)
            return sum(1 for _ in _heads(stream, header))
        except ZFileError as error:
            raise ZFileError(f"{path}: {error}") from error


def _heads(stream: BinaryIO, header: bytes) -> Iterator[Head]:
    """The heads of a file's records, the stream each time behind one; then the end is checked."""
    end, index = os.fstat(stream.fileno()).st_size, Index()
    if not header[2] & NO_DOCUMENT:
        for _, start, head in walk(stream, 0, 0, end, learned=True):
            index.add(head, stream.tell() + head.stored - start)
            yield head
    check_end(stream, header, index)


def _digest(kind: int, info: DocumentInfo, payload: bytes) -> bytes:
    """The original's hash where it comes back, else that of what is stored."""
    if records.is_exact(kind):
        return bytes.fromhex(info.digest or "")
    return digest_of(bytes([kind]) + varint(info.byte_length or 0) + payload)


def _read(path: Path, config: ZTokConfig, fingerprint: str) -> tuple[str, list[records.Stored]]:
    with open(path, "rb") as stream:
        header, _ = read_header(stream, LEARNED_MAGIC)
        identity = header[-IDENTITY_BYTES:]
        precision = next((own for own in PRECISIONS if identity_of(fingerprint, own) == identity), None)
        if precision is None:
            raise ZFileError(
                f"expected Z-tokens of the codec with fingerprint {fingerprint[:16]}..., got those of another one "
                f"(identity {identity.hex()})"
            )
        found: list[records.Stored] = []
        for number, head in enumerate(_heads(stream, header)):
            payload = stream.read(head.stored)
            try:
                own = records.read_document(head.kind, head.length, payload, head.digest, config)
            except (ZFileError, ZBatchError) as error:
                raise ZFileError(f"document {number}: {error}") from error
            if not records.is_exact(head.kind) and _digest(head.kind, own.info, payload) != head.digest:
                raise ZFileError(
                    f"document {number}: expected the hash that the file states, got another: it is damaged"
                )
            found.append(own)
    return precision, found


def _ztokens(stored: list[records.Stored], config: ZTokConfig, precision: str, read_prior: ReadPrior) -> ZTokens:
    parts: list[ZTokens | None] = [None] * len(stored)
    under = [i for i, own in enumerate(stored) if own.coding == records.PRIOR]
    for i in under:
        own, most = stored[i], records.MOST_TOKENS_OF_A_BYTE * len(stored[i].stream)
        if own.info.tokens > most:
            raise ZFileError(f"document {i}: expected at most {most} tokens, got {own.info.tokens}: it is damaged")
    if under:
        together = read_prior(precision, [stored[i].stream for i in under], [stored[i].info.tokens for i in under])
        for place, i in enumerate(under):
            parts[i] = together.part(place)
    for i, own in enumerate(stored):
        if own.coding != records.PRIOR:
            try:
                parts[i] = records.read_ztokens(own, config)
            except ZFileError as error:
                raise ZFileError(f"document {i}: {error}") from error
    nothing = no_documents(config.num_codebooks, config.emission == "slots")
    return concatenate([nothing, *(own for own in parts if own is not None)])
