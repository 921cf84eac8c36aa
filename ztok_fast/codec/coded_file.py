"""Files of coded units, read part by part in constant memory, or one document of many.

docs/file-format.md specifies the layout, `ztok_fast.codec.container` has its records, `ztok_fast.codec.coded_writer`
writes it.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ztok_fast.codec.base_model import BaseModel, load_base
from ztok_fast.codec.coded import DEFAULT_BASE, PART_BYTES, Part, Progress, TextCoder, identity_of
from ztok_fast.codec.container import (
    CODED_FORM,
    HEADER_BYTES,
    IDENTITY_BYTES,
    INDEXED,
    RUN,
    Head,
    Index,
    check_end,
    header_with_index,
    read_head,
    read_header,
    read_records,
)
from ztok_fast.codec.container_file import DocumentFile, open_file
from ztok_fast.codec.container_writer import BLOCK_BYTES, BLOCK_PARTS
from ztok_fast.codec.documents import HASH_BYTES, digest_of
from ztok_fast.codec.errors import ZFileError

_BYTES_PER_TOKEN = 3

PRECISIONS = ("int8", "float32")


class CodedFile(DocumentFile[bytes]):
    """A sequence of the documents of a file of coded units; use it in a ``with`` statement, or close it.

    Opening reads the index and the heads of the last records. A document takes the heads of at most 256 records and the
    decoding of its own. `parts` gives a document in parts of at most 1 MiB.

    Args:
        path: the file.
        coder: that reads it; ``None`` makes the one that the file names, with the base model that ships.

    Raises:
        ZFileError: the file is truncated, damaged, of another kind or of another coder.
    """

    form = CODED_FORM

    def __init__(self, path: str | Path, coder: TextCoder | None = None) -> None:
        self.coder = coder_for(path, load_base(str(DEFAULT_BASE))) if coder is None else coder
        super().__init__(path)

    @classmethod
    def from_base(cls, path: str | Path, base: BaseModel | str | Path, precision: str | None = None) -> CodedFile:
        """With the coder that the file names, of another base model than the one that ships."""
        loaded = base if isinstance(base, BaseModel) else load_base(str(base))
        return cls(path, coder_for(path, loaded, precision))

    def __getitem__(self, number: int) -> bytes:
        """Document ``number``, from 0; negative ones count from the end."""
        return b"".join(self.parts(number))

    def __iter__(self) -> Iterator[bytes]:
        """All documents in order, many of them decoded side by side."""
        own: list[bytes] = []
        for text, goes_on in read_coded(self.path, self.coder):
            own.append(text)
            if not goes_on:
                yield b"".join(own)
                own = []

    def _check_header(self, stream: BinaryIO) -> None:
        check_header(stream, self.coder)

    def _read(self, stream: BinaryIO, index: Index, end: int) -> Iterator[bytes]:
        for text, _ in decode_records(stream, self.coder, index, end, whole=False):
            yield text


def block_bytes(coder: TextCoder) -> int:
    """Bytes of text in a block: more than usual where that many do not fill all rows with segments."""
    return max(BLOCK_BYTES, _BYTES_PER_TOKEN * coder.rows * coder.context)


def header_of(coder: TextCoder) -> bytes:
    """What a coder's file begins with: the magic, a byte of version and context, and the coder's identity."""
    return CODED_FORM.magic + bytes([CODED_FORM.version << 4 | coder.context.bit_length() - 1]) + coder.identity


def coder_for(path: str | Path, base: BaseModel, precision: str | None = None, rows: int = 128) -> TextCoder:
    """The coder that reads a file, which states its context; its window is found, and its precision unless it is given.

    Raises:
        ZFileError: no coder with this base model (and precision) made the file, or it is of another kind.
    """
    with open(path, "rb") as stream:
        try:
            return coder_of(stream.read(HEADER_BYTES), base, precision, rows)
        except ZFileError as error:
            raise ZFileError(f"{path}: {error}") from error


def coder_of(header: bytes, base: BaseModel, precision: str | None = None, rows: int = 128) -> TextCoder:
    """As `coder_for`, from what a file begins with."""
    head = read_header(io.BytesIO(header), CODED_FORM)
    context, identity = 1 << (head[2] & 15), head[-IDENTITY_BYTES:]
    for own in PRECISIONS if precision is None else (precision,):
        for window in (1 << log for log in range(context.bit_length())):
            if identity_of(base, own, context, window) == identity:
                return TextCoder(base, own, context, rows, window)
    wanted = "int8 or float32" if precision is None else precision
    raise ZFileError(
        f"expected a file coded with base model {base.name} in {wanted}, got one of another base model or precision "
        f"(identity {identity.hex()})"
    )


def read_coded(path: str | Path, coder: TextCoder, progress: Progress | None = None) -> Iterator[tuple[bytes, bool]]:
    """The parts of all documents in order, each with whether its document goes on.

    Raises:
        ZFileError: the file is truncated, damaged, of another kind or of another coder; never another text.
    """
    path = Path(path)
    with open(path, "rb") as stream:
        try:
            end = os.fstat(stream.fileno()).st_size
            header, index = check_header(stream, coder), Index()
            yield from decode_records(stream, coder, index, end, whole=True, progress=progress)
            check_end(stream, header, index)
        except ZFileError as error:
            raise ZFileError(f"{path}: {error}") from error


def texts_of(files: Sequence[bytes], coder: TextCoder) -> list[bytes]:
    """The texts of whole files in memory, each of one document; their segments are decoded side by side.

    Raises:
        ZFileError: one of them is damaged or of another coder, or has several documents; the message has its number.
    """
    found, short = [b""] * len(files), []
    for number, data in enumerate(files):
        stream, index = io.BytesIO(data), Index()
        try:
            header = check_header(stream, coder)
            head = read_head(stream, 0, 0, len(data), CODED_FORM)
            if not head.follows and head.kind != RUN:
                payload = stream.read(head.stored)
                index.add(head, len(data) - HEADER_BYTES)
                short.append((number, head, payload))
            else:
                stream.seek(HEADER_BYTES)
                parts = decode_records(stream, coder, index, len(data), whole=True)
                found[number] = b"".join(text for text, _ in parts)
            check_end(stream, header, index)
            if index.documents != 1:
                raise ZFileError(f"expected one document, got {index.documents}")
        except ZFileError as error:
            raise ZFileError(f"file {number}: {error}") from error
    texts = coder.decode([Part(head.kind, payload) for _, head, payload in short], [own[1].length for own in short])
    for (number, head, _), text in zip(short, texts):
        try:
            _check_digest(digest_of(text), head)
        except ZFileError as error:
            raise ZFileError(f"file {number}: {error}") from error
        found[number] = text
    return found


def stored_parts(path: str | Path) -> Iterator[tuple[Head, bytes]]:
    """The records of a file, which are not decoded; of a run the head alone.

    Raises:
        ZFileError: the file is truncated, damaged or of another kind.
    """
    with open_file(Path(path)) as stream:
        try:
            header, index = read_header(stream, CODED_FORM), Index()
            for head in read_records(stream, index, os.fstat(stream.fileno()).st_size, CODED_FORM):
                yield head, b"" if head.kind == RUN else stream.read(head.stored)
            check_end(stream, header, index)
        except ZFileError as error:
            raise ZFileError(f"{path}: {error}") from error


def check_header(stream: BinaryIO, coder: TextCoder) -> bytes:
    """The header of a file; `ZFileError` unless a file of this coder begins here."""
    head = read_header(stream, CODED_FORM)
    own = header_of(coder)
    if head not in (own, header_with_index(own)):
        got = head[2:3].hex() if not head[2] & INDEXED else bytes([head[2] & ~INDEXED]).hex()
        raise ZFileError(
            f"expected a file of coder {own[2:].hex()} (version, context, base model and precision), got one of "
            f"{got}{head[3:].hex()}"
        )
    return head


def decode_records(
    stream: BinaryIO, coder: TextCoder, index: Index, end: int, whole: bool, progress: Progress | None = None
) -> Iterator[tuple[bytes, bool]]:
    """The texts of the records from here on, each with whether its document goes on.

    Args:
        index: of the records before; those that are read are counted in it.
        end: bytes of the file.
        whole: to the last record, and not only to the end of this document.
    """
    block: list[tuple[Head, bytes]] = []
    size = 0
    for head in read_records(stream, index, end, CODED_FORM, whole):
        if block and (head.kind == RUN or size + head.length > block_bytes(coder) or len(block) == BLOCK_PARTS):
            yield from _decode_block(block, coder, progress)
            block, size = [], 0
        if head.kind == RUN:
            yield from _read_run(stream, head, progress)
        else:
            block.append((head, stream.read(head.stored)))
            size += head.length
    yield from _decode_block(block, coder, progress)


def _decode_block(block: list[tuple[Head, bytes]], coder: TextCoder, progress) -> Iterator[tuple[bytes, bool]]:
    parts = [Part(head.kind, payload) for head, payload in block]
    for (head, _), text in zip(block, coder.decode(parts, [head.length for head, _ in block], progress)):
        _check_digest(digest_of(text), head)
        yield text, head.goes_on


def _read_run(stream: BinaryIO, head: Head, progress: Progress | None) -> Iterator[tuple[bytes, bool]]:
    """The text of a run in parts; the last of them only when the hash of all is right."""
    digest, left = hashlib.blake2b(digest_size=HASH_BYTES), head.length
    while True:
        text = stream.read(min(left, PART_BYTES))
        digest.update(text)
        left -= len(text)
        if not left or not text:
            break
        yield text, True
        if progress:
            progress(len(text))
    _check_digest(digest.digest(), head)
    yield text, head.goes_on
    if progress:
        progress(len(text))


def _check_digest(found: bytes, head: Head) -> None:
    if found != head.digest:
        raise ZFileError(
            f"part of {head.length} bytes: expected the hash {head.digest.hex()} that the file states for this place, "
            f"got {found.hex()}: the file is damaged"
        )
