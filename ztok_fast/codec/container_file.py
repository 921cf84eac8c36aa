"""Documents of a `.ztok` file at random, without decoding those before."""

from __future__ import annotations

import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, ClassVar, Generic, TypeVar

from ztok_fast.codec.container import (
    HEADER_BYTES,
    INDEXED,
    STRETCH,
    Form,
    Index,
    check_end,
    has_documents,
    read_header,
    read_records,
)
from ztok_fast.codec.errors import ZFileError

Part = TypeVar("Part")
Own = TypeVar("Own", bound="DocumentFile")


class DocumentFile(ABC, Generic[Part]):
    """The documents of a file, each of which is read in parts.

    Raises:
        ZFileError: the file is missing, truncated, damaged, or not one that its reader reads.
    """

    form: ClassVar[Form]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stream = open_file(self.path)
        try:
            self._check_header(self._stream)
            self._index = _read_index(self._stream, self.form)
        except ZFileError as error:
            self.close()
            raise ZFileError(f"{self.path}: {error}") from error
        except BaseException:
            self.close()
            raise
        self._begins: tuple[int, list[tuple[int, int]]] = (-1, [])

    @abstractmethod
    def _check_header(self, stream: BinaryIO) -> None:
        """Raise `ZFileError` unless a file begins here that this object reads."""

    @abstractmethod
    def _read(self, stream: BinaryIO, index: Index, end: int) -> Iterator[Part]:
        """The parts of the document that begins here; ``index`` is of the records before."""

    def __len__(self) -> int:
        return self._index.documents

    @property
    def text_bytes(self) -> int:
        """Bytes of text of all documents."""
        return self._index.text

    def parts(self, number: int) -> Iterator[Part]:
        """Document ``number``, from 0, in its parts; negative ones count from the end.

        Raises:
            IndexError: there is no such document.
            ZFileError: it is damaged; parts before the damage may have been given.
        """
        place = operator.index(number)
        if not -len(self) <= place < len(self):
            raise IndexError(f"document: expected {-len(self)} to {len(self) - 1}, got {number}")
        return self._parts(place % len(self))

    def _parts(self, place: int) -> Iterator[Part]:
        try:
            before = Index()
            before.records, before.at = self._begin_of(place)
            before.documents = place
            self._stream.seek(before.at)
            for part in self._read(self._stream, before, _end(self._stream)):
                # Another document may be read between two parts of this one.
                after = self._stream.tell()
                yield part
                self._stream.seek(after)
        except ZFileError as error:
            raise ZFileError(f"{self.path}, document {place}: {error}") from error

    def _begin_of(self, place: int) -> tuple[int, int]:
        """Number and first byte of the record with which a document begins: the one after the end of that before."""
        if place == 0:
            return 0, HEADER_BYTES
        stretch = self._index.stretch_of(place)
        if self._begins[0] != stretch:
            index, begins = self._index.at_stretch(stretch), []
            self._stream.seek(index.at)
            for head in islice(read_records(self._stream, index, _end(self._stream), self.form), STRETCH):
                if not head.goes_on:
                    begins.append((index.records, index.at))
            self._begins = (stretch, begins)
        ended = place - self._index.before[stretch][0]
        if ended > len(self._begins[1]):
            raise ZFileError(f"index: expected {ended} documents to end from record {stretch * STRETCH} on, got fewer")
        return self._begins[1][ended - 1]

    def close(self) -> None:
        self._stream.close()

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_file(path: Path) -> BinaryIO:
    """A file for reading; `ZFileError` if there is none."""
    if not path.is_file():
        raise ZFileError(f"{path}: expected an existing .ztok file, got none")
    return open(path, "rb")


def stored_length(path: str | Path, form: Form) -> tuple[int, int]:
    """Documents, and bytes of text, that a file states; known without decoding it."""
    with open_file(Path(path)) as stream:
        try:
            index = _read_index(stream, form)
        except ZFileError as error:
            raise ZFileError(f"{path}: {error}") from error
    return index.documents, index.text


def _read_index(stream: BinaryIO, form: Form) -> Index:
    """The index of a whole file: what it ends with, and the heads of the records after the last entry."""
    end = _end(stream)
    stream.seek(0)
    header = read_header(stream, form)
    found = Index.load(stream, header, end) if header[2] & INDEXED else Index()
    stream.seek(found.at)
    if has_documents(header):
        for _ in read_records(stream, found, end, form):
            pass
    check_end(stream, header, found)
    return found


def _end(stream: BinaryIO) -> int:
    return os.fstat(stream.fileno()).st_size
