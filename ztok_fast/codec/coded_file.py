"""Files of coded units: texts stored exactly, read and written part by part in constant memory.

docs/file-format.md specifies the layout. A file is written beside its name and takes it when it is whole. What an
interrupted run left there is checked against the texts and gone on from: the same command gives the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ztok_fast.codec.base_model import BaseModel
from ztok_fast.codec.coded import CODED, LZMA, PART_BYTES, RAW, Part, Progress, TextCoder, identity_of
from ztok_fast.codec.errors import ZFileError
from ztok_fast.codec.varint import MOST_BYTES, read_varint, varint
from ztok_fast.codec.zfile import CODED_MAGIC as MAGIC
from ztok_fast.codec.zfile import begins_as_coded

IDENTITY_BYTES = HASH_BYTES = 8
HEADER_BYTES = len(MAGIC) + 1 + IDENTITY_BYTES
BATCH_BYTES, BATCH_PARTS = 192 << 10, 4096
"""Bytes of text, and parts of it, that are coded side by side at most; more bytes where that many do not fill all rows
with segments."""

_BYTES_PER_TOKEN = 3

PRECISIONS = ("int8", "float32")
_VERSION = 1

_GOES_ON = 128
_RECORD_HEAD = 1 + MOST_BYTES + HASH_BYTES + MOST_BYTES


@dataclass(frozen=True)
class Record:
    """A stored part of a document, ``length`` bytes of text with hash ``digest``; the last one unless ``goes_on``."""

    part: Part
    length: int
    digest: bytes
    goes_on: bool

    def to_bytes(self) -> bytes:
        head = bytes([self.part.mode | (_GOES_ON if self.goes_on else 0)])
        return head + varint(self.length) + self.digest + varint(len(self.part.payload)) + self.part.payload


def _batch_bytes(coder: TextCoder) -> int:
    return max(BATCH_BYTES, _BYTES_PER_TOKEN * coder.rows * coder.context)


def digest_of(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=HASH_BYTES).digest()


def header_of(coder: TextCoder) -> bytes:
    """What a coder's file begins with: the magic, a byte of version and context, and the coder's identity."""
    return MAGIC + bytes([_VERSION << 4 | coder.context.bit_length() - 1]) + coder.identity


def is_coded_file(path: str | Path) -> bool:
    """Whether a file begins as one of coded units does."""
    with open(path, "rb") as stream:
        return begins_as_coded(stream.read(HEADER_BYTES))


def coder_for(path: str | Path, base: BaseModel, precision: str | None = None, rows: int = 128) -> TextCoder:
    """The coder that reads a file, which states its context; its window is found, and its precision unless it is given.

    Raises:
        ZFileError: no coder with this base model (and precision) made the file, or it is of another kind.
    """
    with open(path, "rb") as stream:
        head = stream.read(HEADER_BYTES)
    if not begins_as_coded(head) or len(head) < HEADER_BYTES:
        raise ZFileError(f"{path}: expected a file of coded units, got another kind")
    if head[2] >> 4 != _VERSION:
        raise ZFileError(f"{path}: expected version {_VERSION} of coded units, got {head[2] >> 4}")
    context, identity = 1 << (head[2] & 15), head[-IDENTITY_BYTES:]
    for own in PRECISIONS if precision is None else (precision,):
        for window in (1 << log for log in range(context.bit_length())):
            if identity_of(base, own, context, window) == identity:
                return TextCoder(base, own, context, rows, window)
    wanted = "int8 or float32" if precision is None else precision
    raise ZFileError(
        f"{path}: expected a file coded with base model {base.name} in {wanted}, got one of another base model or "
        f"precision (identity {identity.hex()})"
    )


def parts_of(stream: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """The parts of a document, each with whether it goes on; cut between UTF-8 characters where there are any."""
    rest = stream.read(PART_BYTES)
    while True:
        more = stream.read(PART_BYTES - len(rest)) if len(rest) < PART_BYTES else b""
        rest += more
        if len(rest) < PART_BYTES:
            yield rest, False
            return
        cut = len(rest)
        while cut > len(rest) - 4 and rest[cut - 1] & 0xC0 == 0x80:
            cut -= 1
        # A character that is begun and not ended goes to the next part; four bytes that end none are no UTF-8.
        cut = cut - 1 if rest[cut - 1] >= 0xC0 else len(rest)
        after = stream.read(PART_BYTES - len(rest) + cut)
        yield rest[:cut], bool(rest[cut:] or after)
        if not rest[cut:] and not after:
            return
        rest = rest[cut:] + after


def write_coded(
    path: str | Path,
    parts: Iterable[tuple[bytes, bool]],
    coder: TextCoder,
    verify: bool = True,
    progress: Progress | None = None,
) -> int:
    """Write the parts of documents (`parts_of`, one document after another); returns the file's size in bytes.

    Args:
        verify: decode what was encoded; a part that does not come back is stored otherwise, with a warning.
        progress: called with the bytes of text just finished.
    """
    path = Path(os.path.realpath(path))  # of a link, the file that it points to
    partial = path.with_name(path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    remaining = iter(parts)
    with open(partial, "r+b" if partial.exists() else "w+b") as out:
        first = _resume(out, remaining, coder, progress)
        batch: list[tuple[bytes, bool]] = [first] if first is not None else []
        size = len(first[0]) if first is not None else 0
        for part in remaining:
            if batch and (size + len(part[0]) > _batch_bytes(coder) or len(batch) == BATCH_PARTS):
                _write_batch(out, batch, coder, verify, progress)
                batch, size = [], 0
            batch.append(part)
            size += len(part[0])
        _write_batch(out, batch, coder, verify, progress)
        os.fsync(out.fileno())
        size = out.tell()
    os.replace(partial, path)
    return size


def _resume(
    out: BinaryIO, parts: Iterator[tuple[bytes, bool]], coder: TextCoder, progress
) -> tuple[bytes, bool] | None:
    """Leave ``out`` after the records that an earlier run wrote for these parts; the first part that is not there."""
    head, part = header_of(coder), None
    out.seek(0)
    if out.read(len(head)) != head:
        out.seek(0)
        out.truncate()
        out.write(head)
        return None
    whole = out.tell()
    for part in parts:
        try:
            record = _read_record(out)
        except ZFileError:
            record = None
        text, goes_on = part
        if record is None or (record.length, record.digest, record.goes_on) != (len(text), digest_of(text), goes_on):
            break
        whole, part = out.tell(), None
        if progress:
            progress(len(text))
    out.seek(whole)
    out.truncate()
    return part


def _write_batch(out: BinaryIO, batch: list[tuple[bytes, bool]], coder: TextCoder, verify: bool, progress) -> None:
    texts = [text for text, _ in batch]
    stored = coder.encode(texts, progress)
    if verify:
        coded = [i for i, part in enumerate(stored) if part.mode == CODED]
        try:
            back = coder.decode([stored[i] for i in coded], [len(texts[i]) for i in coded])
        except ZFileError:
            back = [b""] * len(coded)
        for i, text in zip(coded, back):
            if text != texts[i]:
                warnings.warn("a part did not come back as it was and is stored without the model", stacklevel=2)
                stored[i] = Part(RAW, texts[i])
    for (text, goes_on), part in zip(batch, stored):
        out.write(Record(part, len(text), digest_of(text), goes_on).to_bytes())
    out.flush()


def read_coded(path: str | Path, coder: TextCoder, progress: Progress | None = None) -> Iterator[tuple[bytes, bool]]:
    """The parts of all documents in order, each with whether its document goes on.

    Raises:
        ZFileError: the file is truncated, damaged, of another kind or of another coder; never another text.
    """
    path = Path(path)
    with open(path, "rb") as stream:
        try:
            check_header(stream, coder)
            batch: list[Record] = []
            size = 0
            while True:
                record = _read_record(stream)
                full = record is None or size + record.length > _batch_bytes(coder) or len(batch) == BATCH_PARTS
                if batch and full:
                    texts = coder.decode([r.part for r in batch], [r.length for r in batch], progress)
                    for own, text in zip(batch, texts):
                        if digest_of(text) != own.digest:
                            raise ZFileError("a part does not have the hash that the file states: it is damaged")
                        yield text, own.goes_on
                    batch, size = [], 0
                if record is None:
                    return
                batch.append(record)
                size += record.length
        except ZFileError as error:
            raise ZFileError(f"{path}: {error}") from error


def check_header(stream: BinaryIO, coder: TextCoder) -> None:
    """Raise `ZFileError` unless a file of this coder begins here."""
    head = stream.read(HEADER_BYTES)
    if not begins_as_coded(head):
        raise ZFileError("expected a file of coded units, got another kind")
    if head != header_of(coder):
        raise ZFileError(
            f"expected a file of coder {header_of(coder)[2:].hex()} (version, context, base model and precision), got "
            f"one of {head[2:].hex()}"
        )


def stored_length(path: str | Path) -> tuple[int, int]:
    """Documents, and bytes of text, that a file states; read without decoding it."""
    documents = size = 0
    with open(path, "rb") as stream:
        stream.seek(HEADER_BYTES)
        try:
            while (record := _read_record(stream)) is not None:
                size += record.length
                documents += not record.goes_on
        except ZFileError as error:
            raise ZFileError(f"{path}: {error}") from error
    return documents, size


def _read_record(stream: BinaryIO) -> Record | None:
    """The next record, or ``None`` at the end."""
    start = stream.tell()
    head = stream.read(_RECORD_HEAD)
    if not head:
        return None
    mode, goes_on = head[0] & ~_GOES_ON, bool(head[0] & _GOES_ON)
    if mode not in (CODED, RAW, LZMA):
        raise ZFileError(f"record: expected a kind of storage from 0 to 2, got {mode}: the file is damaged")
    length, at = read_varint(head, 1)
    digest = head[at : at + HASH_BYTES]
    stored, at = read_varint(head, at + HASH_BYTES)
    # What is stored is never larger than the part itself.
    if length > PART_BYTES or stored > length:
        raise ZFileError(f"record: expected at most {PART_BYTES} bytes, got {length} in {stored}: the file is damaged")
    stream.seek(start + at)
    payload = stream.read(stored)
    if len(payload) < stored:
        raise ZFileError(f"record: expected {stored} bytes, got {len(payload)}: the file is truncated")
    return Record(Part(mode, payload), length, digest, goes_on)
