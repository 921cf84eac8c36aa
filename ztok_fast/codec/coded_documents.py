"""`CodedFile`: the documents of a file of coded units at random, without decoding those before."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from ztok_fast.codec.base_model import BaseModel, load_base
from ztok_fast.codec.coded import DEFAULT_BASE, TextCoder
from ztok_fast.codec.coded_file import check_header, coder_for, decode_records, read_coded
from ztok_fast.codec.coded_records import HEADER_BYTES, INDEXED, STRETCH, Index, check_end, read_header, walk
from ztok_fast.codec.errors import ZFileError


class CodedFile:
    """A sequence of the documents of a file of coded units; use it in a ``with`` statement, or close it.

    Opening reads the index and the heads of the last records. A document takes the heads of at most 256 records and the
    decoding of its own.

    Args:
        path: the file.
        coder: that reads it; ``None`` makes the one that the file names, with the base model that ships.

    Raises:
        ZFileError: the file is truncated, damaged, of another kind or of another coder.
    """

    def __init__(self, path: str | Path, coder: TextCoder | None = None) -> None:
        self.path = Path(path)
        self.coder = coder_for(self.path, load_base(str(DEFAULT_BASE))) if coder is None else coder
        self._stream: BinaryIO = open(self.path, "rb")  # noqa: SIM115 - `close` closes it
        try:
            check_header(self._stream, self.coder)
            self._index = _read_index(self._stream)
        except ZFileError as error:
            self.close()
            raise ZFileError(f"{self.path}: {error}") from error
        except BaseException:
            self.close()
            raise
        self._heads: tuple[int, list[tuple[int, int]]] = (-1, [])

    @classmethod
    def from_base(cls, path: str | Path, base: BaseModel | str | Path, precision: str | None = None) -> CodedFile:
        """With the coder that the file names, of another base model than the one that ships."""
        loaded = base if isinstance(base, BaseModel) else load_base(str(base))
        return cls(path, coder_for(path, loaded, precision))

    def __len__(self) -> int:
        return self._index.documents

    @property
    def text_bytes(self) -> int:
        """Bytes of text of all documents."""
        return self._index.text

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

    def parts(self, number: int) -> Iterator[bytes]:
        """A document in parts of at most 1 MiB.

        Raises:
            IndexError: there is no such document.
            ZFileError: it is damaged; parts before the damage may have been given.
        """
        place = operator.index(number)
        if not -len(self) <= place < len(self):
            raise IndexError(f"document: expected {-len(self)} to {len(self) - 1}, got {number}")
        return self._parts(place % len(self))

    def _parts(self, place: int) -> Iterator[bytes]:
        try:
            before = Index()
            before.records, before.at = self._begin_of(place)
            before.documents = place
            self._stream.seek(before.at)
            for text, _ in decode_records(self._stream, self.coder, before, self._end(), whole=False):
                # Another document may be read between two parts of this one.
                after = self._stream.tell()
                yield text
                self._stream.seek(after)
        except ZFileError as error:
            raise ZFileError(f"{self.path}, document {place}: {error}") from error

    def _begin_of(self, place: int) -> tuple[int, int]:
        """Number and first byte of the record with which a document begins: the one after the end of that before."""
        if place == 0:
            return 0, HEADER_BYTES
        stretch = self._index.stretch_of(place)
        if self._heads[0] != stretch:
            documents, _, at = self._index.before[stretch]
            self._stream.seek(at)
            begins = []
            for number, _, head in islice(walk(self._stream, stretch * STRETCH, documents, self._end()), STRETCH):
                if not head.goes_on:
                    begins.append((number + 1, self._stream.tell() + head.stored))
            self._heads = (stretch, begins)
        ended = place - self._index.before[stretch][0]
        if ended > len(self._heads[1]):
            raise ZFileError(f"index: expected {ended} documents to end from record {stretch * STRETCH} on, got fewer")
        return self._heads[1][ended - 1]

    def _end(self) -> int:
        return os.fstat(self._stream.fileno()).st_size

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> CodedFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def stored_length(path: str | Path) -> tuple[int, int]:
    """Documents, and bytes of text, that a file states; read without decoding it."""
    with open(path, "rb") as stream:
        try:
            read_header(stream)
            index = _read_index(stream)
        except ZFileError as error:
            raise ZFileError(f"{path}: {error}") from error
    return index.documents, index.text


def _read_index(stream: BinaryIO) -> Index:
    """The index of a whole file: what it ends with, and the heads of the records after the last entry."""
    end = os.fstat(stream.fileno()).st_size
    stream.seek(0)
    header, _ = read_header(stream)
    found = Index.load(stream, header, end) if header[2] & INDEXED else Index()
    stream.seek(found.at)
    for _, start, head in walk(stream, found.records, found.documents, end):
        found.add(head, stream.tell() + head.stored - start)
    check_end(stream, header, found)
    return found
