"""Writing files of coded units in constant memory.

A file is written beside its name and takes it when it is whole. What an interrupted run left there is checked against
the texts and gone on from: the same command gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ztok_fast.codec.coded import CODED, RAW, Part, Progress, TextCoder
from ztok_fast.codec.coded_file import BATCH_PARTS, batch_bytes, header_of, parts_of
from ztok_fast.codec.coded_records import (
    HEADER_BYTES,
    MOST_RUN,
    RUN,
    RUN_HEAD_BYTES,
    Head,
    Index,
    header_with_index,
    is_alone,
    read_head,
)
from ztok_fast.codec.documents import HASH_BYTES, digest_of
from ztok_fast.codec.errors import CodecError, ZFileError
from ztok_fast.codec.varint import varint

_LEAST_SAVED = 30
"""Bytes that a part of a long document has to save, or it is stored raw: its head, and that of a run after it."""


class _Piece(NamedTuple):
    """A part of the input: ``goes_on`` and ``follows`` as in `Head`, ``first`` where a document begins."""

    text: bytes
    first: bool
    goes_on: bool
    follows: bool


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

    Raises:
        CodecError: there is no document, or the last one is said to go on.
    """
    path = Path(os.path.realpath(path))  # of a link, the file that it points to
    partial = path.with_name(path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    pieces = _pieces(parts)
    with open(partial, "r+b" if partial.exists() else "w+b") as out:
        writer = _Writer(out, header_of(coder))
        first = writer.resume(pieces, progress)
        batch: list[_Piece] = [first] if first is not None else []
        size = len(first.text) if first is not None else 0
        for piece in pieces:
            if batch and (size + len(piece.text) > batch_bytes(coder) or len(batch) == BATCH_PARTS):
                writer.add(batch, _stored(batch, coder, verify, progress))
                batch, size = [], 0
            batch.append(piece)
            size += len(piece.text)
        writer.add(batch, _stored(batch, coder, verify, progress))
        size = writer.finish()
        os.fsync(out.fileno())
    os.replace(partial, path)
    return size


def coded_bytes(texts: Sequence[bytes], coder: TextCoder, verify: bool = True) -> list[bytes]:
    """Whole files, in memory, each of one document; their segments are coded side by side."""
    pieces = [list(_pieces(parts_of(io.BytesIO(text)))) for text in texts]
    batch = [piece for own in pieces for piece in own]
    stored = iter(_stored(batch, coder, verify, None) if batch else ())
    found = []
    for own in pieces:
        out = io.BytesIO(header_of(coder))
        writer = _Writer(out, out.getvalue())
        writer.add(own, [next(stored) for _ in own])
        writer.finish()
        found.append(out.getvalue())
    return found


def _pieces(parts: Iterable[tuple[bytes, bool]]) -> Iterator[_Piece]:
    iterator, first = iter(parts), True
    part = next(iterator, None)
    if part is None:
        raise CodecError("documents: expected at least one, got none")
    while part is not None:
        text, goes_on = part
        part = next(iterator, None)
        if goes_on and part is None:
            raise CodecError("documents: expected another part of the last one, got none")
        yield _Piece(text, first, goes_on, part is not None)
        first = not goes_on


def _stored(batch: list[_Piece], coder: TextCoder, verify: bool, progress: Progress | None) -> list[Part]:
    """The parts of a batch as they are to be stored."""
    texts = [piece.text for piece in batch]
    stored = coder.encode(texts, None if verify else progress)
    if verify:
        coded = [i for i, part in enumerate(stored) if part.mode == CODED]
        try:
            back = coder.decode([stored[i] for i in coded], [len(texts[i]) for i in coded], progress)
        except ZFileError:
            back = [b""] * len(coded)
        for i, text in zip(coded, back):
            if text != texts[i]:
                warnings.warn("a part did not come back as it was and is stored without the model", stacklevel=2)
                stored[i] = Part(RAW, texts[i])
        if progress:
            progress(sum(map(len, texts)) - sum(len(texts[i]) for i in coded))
    for i, (piece, part) in enumerate(zip(batch, stored)):
        size = len(part.payload)
        least = _LEAST_SAVED if piece.goes_on or not piece.first else len(varint(size))
        if part.mode != RAW and size + least > len(piece.text):
            stored[i] = Part(RAW, piece.text)
    return stored


class _Writer:
    """Appends records to a file of coded units. A run, the raw parts of one document, is open until another begins."""

    def __init__(self, out: BinaryIO, header: bytes) -> None:
        self.out, self.header, self.index = out, header, Index()
        self._run: Head | None = None
        self._hash = hashlib.blake2b(digest_size=HASH_BYTES)

    def resume(self, pieces: Iterator[_Piece], progress: Progress | None) -> _Piece | None:
        """Go to the end of the records that an earlier run wrote for these pieces; the first that is not there."""
        out = self.out
        end = out.seek(0, os.SEEK_END)
        out.seek(0)
        head = out.read(HEADER_BYTES)
        out.seek(0)
        if len(head) < HEADER_BYTES or head not in (self.header, header_with_index(self.header)):
            out.truncate()
            out.write(self.header)
            return next(pieces, None)
        out.write(self.header)
        piece = next(pieces, None)
        while piece is not None:
            number, document = self._place()
            out.seek(self._end())
            try:
                found = read_head(out, number, document, end)
            except ZFileError:
                break
            if found.kind == RUN:
                before, piece = piece, self._resume_run(found.length, piece, pieces, progress)
                if piece is before or self._run is None or self._run.length < found.length:
                    break
                continue
            own = (len(piece.text), digest_of(piece.text), piece.goes_on, piece.follows)
            # A record that is alone does not state its size: one that was cut off would look whole.
            if own != (found.length, found.digest, found.goes_on, found.follows) or is_alone(number, found.follows):
                break
            after = out.tell() + found.stored
            self._close_run()
            self.index.add(found, after - self.index.at)
            if progress:
                progress(len(piece.text))
            piece = next(pieces, None)
        out.seek(self._end())
        out.truncate()
        return piece

    def _resume_run(self, length: int, first: _Piece, pieces: Iterator[_Piece], progress) -> _Piece | None:
        """Take the pieces that are in a run of this length as it stands in the file; the first that is not."""
        piece: _Piece | None = first
        taken = 0
        while piece is not None and taken + len(piece.text) <= length and (piece.goes_on or not piece.first):
            if self.out.read(len(piece.text)) != piece.text:
                break
            if not taken:
                self._close_run()
            taken += len(piece.text)
            self._grow(piece)
            if progress:
                progress(len(piece.text))
            ended, piece = not piece.goes_on, next(pieces, None)
            if ended:
                break
        if taken:
            self._write_run_head()
        return piece

    def add(self, batch: list[_Piece], stored: list[Part]) -> None:
        """Append the records of a batch."""
        for piece, part in zip(batch, stored):
            if part.mode == RAW and (piece.goes_on or not piece.first):
                if self._run is not None and (piece.first or self._run.length + len(piece.text) > MOST_RUN):
                    self._close_run()
                self.out.seek(0, os.SEEK_END)
                if self._run is None:
                    self.out.write(bytes(RUN_HEAD_BYTES))
                # First the text, then the head that counts it: a run that was cut off is a shorter one.
                self.out.write(piece.text)
                self.out.flush()
                self._grow(piece)
                self._write_run_head()
            else:
                self._close_run()
                self.out.seek(0, os.SEEK_END)
                head = Head(
                    part.mode, len(piece.text), len(part.payload), digest_of(piece.text), piece.goes_on, piece.follows
                )
                data = head.to_bytes(self.index.records, self.index.documents) + part.payload
                self.out.write(data)
                self.index.add(head, len(data))
        self.out.flush()

    def finish(self) -> int:
        """Write the index, where there is one; returns the file's size."""
        self._close_run()
        self.out.seek(0, os.SEEK_END)
        if tail := self.index.to_bytes(self.header):
            self.out.write(tail)
            self.out.seek(0)
            self.out.write(header_with_index(self.header))
        self.out.flush()
        return self.out.seek(0, os.SEEK_END)

    def _grow(self, piece: _Piece) -> None:
        """Count a piece as the end of the run."""
        if self._run is None:
            self._hash = hashlib.blake2b(digest_size=HASH_BYTES)
        self._hash.update(piece.text)
        length = (0 if self._run is None else self._run.length) + len(piece.text)
        self._run = Head(RUN, length, length, self._hash.digest(), piece.goes_on, piece.follows)

    def _write_run_head(self) -> None:
        assert self._run is not None
        self.out.seek(self.index.at)
        self.out.write(self._run.to_bytes(self.index.records, self.index.documents))
        self.out.flush()

    def _close_run(self) -> None:
        if self._run is not None:
            self.index.add(self._run, RUN_HEAD_BYTES + self._run.length)
            self._run = None

    def _place(self) -> tuple[int, int]:
        """Number, and document, of the record after those that are there."""
        if self._run is None:
            return self.index.records, self.index.documents
        return self.index.records + 1, self.index.documents + (not self._run.goes_on)

    def _end(self) -> int:
        return self.index.at + (0 if self._run is None else RUN_HEAD_BYTES + self._run.length)
