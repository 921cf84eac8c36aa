"""Writing `.ztok` files in constant memory, block by block.

A file is written beside its name and takes it when it is whole. What an interrupted run left there is checked against
the texts, block by block, and gone on from: the same command gives the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ztok_fast.codec.coded import PART_BYTES, RAW, Progress
from ztok_fast.codec.container import (
    CODED_FORM,
    HEADER_BYTES,
    IDENTITY_BYTES,
    LEARNED_FORM,
    MOST_RUN,
    RUN,
    RUN_HEAD_BYTES,
    Form,
    Head,
    Index,
    header_with_index,
    is_alone,
    read_head,
)
from ztok_fast.codec.documents import HASH_BYTES, digest_of
from ztok_fast.codec.errors import CodecError, ZFileError

BLOCK_BYTES, BLOCK_PARTS = 192 << 10, 4096
"""Bytes of text, and parts of it, that are stored and read side by side at most: what an interruption loses, unless
a part is longer."""


class Piece(NamedTuple):
    """A part of the input.

    Attributes:
        document: its number; start: the bytes of the document before this part; first: whether it begins here.
        goes_on, follows: as in `Head`.
    """

    text: bytes
    document: int
    start: int
    first: bool
    goes_on: bool
    follows: bool


class Stored(NamedTuple):
    """How a piece is stored: kind, bytes and hash of its record."""

    kind: int
    payload: bytes
    digest: bytes


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


def pieces_of(parts: Iterable[tuple[bytes, bool]]) -> Iterator[Piece]:
    """The parts of documents (`parts_of`, one document after another) with their places.

    Raises:
        CodecError: there is no document, or the last one is said to go on.
    """
    iterator, document, start, first = iter(parts), 0, 0, True
    part = next(iterator, None)
    if part is None:
        raise CodecError("documents: expected at least one, got none")
    while part is not None:
        text, goes_on = part
        part = next(iterator, None)
        if goes_on and part is None:
            raise CodecError("documents: expected another part of the last one, got none")
        yield Piece(text, document, start, first, goes_on, part is not None)
        document, start = (document, start + len(text)) if goes_on else (document + 1, 0)
        first = not goes_on


def blocks_of(pieces: Iterable[Piece], most_bytes: int) -> Iterator[list[Piece]]:
    """Pieces that are stored side by side; what stands in a block follows from the pieces alone."""
    block: list[Piece] = []
    size = 0
    for piece in pieces:
        if block and (size + len(piece.text) > most_bytes or len(block) == BLOCK_PARTS):
            yield block
            block, size = [], 0
        block.append(piece)
        size += len(piece.text)
    if block:
        yield block


def write_file(
    path: str | Path,
    parts: Iterable[tuple[bytes, bool]],
    writer_of: Callable[[BinaryIO], Writer],
    store: Callable[[list[Piece]], Sequence[Stored]],
    most_bytes: int,
    progress: Progress | None = None,
) -> int:
    """Write the parts of documents (`parts_of`, one document after another); returns the file's size in bytes.

    Args:
        store: how the pieces of a block are stored, side by side. most_bytes: of text in a block.
        progress: called with the bytes of text that an interrupted run has stored.

    Raises:
        CodecError: as of `pieces_of`.
    """
    path = Path(os.path.realpath(path))  # of a link, the file that it points to
    partial = path.with_name(path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    blocks = blocks_of(pieces_of(parts), most_bytes)
    with open(partial, "r+b" if partial.exists() else "w+b") as out:
        writer = writer_of(out)
        try:
            block = writer.resume(blocks, progress)
            while block is not None:
                writer.add(block, store(block))
                block = next(blocks, None)
            size = writer.finish()
        except BaseException:
            if writer.is_empty:
                partial.unlink()  # there is nothing to go on from
            raise
        os.fsync(out.fileno())
    os.replace(partial, path)
    return size


class Writer:
    """Appends records to a file. A run, the raw parts of one document, is open until another begins.

    Args:
        out: the file, which may hold what an interrupted run has written; header: its first bytes.
        settings: what the records depend on beside what the header names.
        is_of: whether a record, by its head, is of a text.
    """

    def __init__(
        self,
        out: BinaryIO,
        header: bytes,
        settings: bytes = b"",
        is_of: Callable[[Head, bytes], bool] = lambda head, text: head.digest == digest_of(text),
    ) -> None:
        self.out, self.header, self.index, self._is_of = out, header, Index(), is_of
        # While it is written, a file that depends on settings has another identity, which names them too.
        self._begin = header[:-IDENTITY_BYTES] + digest_of(header + settings) if settings else header
        self._begins = (self._begin,) if settings else (header, header_with_index(header))
        self._form: Form = LEARNED_FORM if header.startswith(LEARNED_FORM.magic) else CODED_FORM
        self._run: Head | None = None
        self._hash = hashlib.blake2b(digest_size=HASH_BYTES)
        self._left = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is stored."""
        return not self.index.records and self._run is None

    def resume(self, blocks: Iterator[list[Piece]], progress: Progress | None = None) -> list[Piece] | None:
        """Go to the end of the last block that an earlier run has stored; the first that it has not."""
        out = self.out
        end = out.seek(0, os.SEEK_END)
        out.seek(0)
        head = out.read(HEADER_BYTES)
        out.seek(0)
        if head not in self._begins:
            out.truncate()
            end = HEADER_BYTES
        out.write(self._begin)
        block = next(blocks, None)
        while block is not None:
            index, run, state = self.index.copy(), self._run, self._hash.copy()
            if not all(self._is_there(piece, end) for piece in block):
                self.index.go_back(index)
                self._run, self._hash = run, state
                break
            if progress:
                progress(sum(len(piece.text) for piece in block))
            block = next(blocks, None)
        self._left = 0
        if self._run is not None:
            self._write_run_head()
        out.seek(self._end())
        out.truncate()
        return block

    def _is_there(self, piece: Piece, end: int) -> bool:
        """Whether the piece stands in the file, of ``end`` bytes, behind those before it; it is then counted."""
        out = self.out
        if not self._left:
            out.seek(self._end())
            number, document = self._place()
            try:
                found = read_head(out, number, document, end, self._form)
            except ZFileError:
                return False
            if found.kind != RUN:
                own = (found.length, found.goes_on, found.follows) == (len(piece.text), piece.goes_on, piece.follows)
                # A record that is alone does not state its size: one that was cut off would look whole.
                if not own or not self._is_of(found, piece.text) or is_alone(number, found.follows):
                    return False
                after = out.tell() + found.stored
                self._end_run()
                self.index.add(found, after - self.index.at)
                return True
            self._end_run()
            self._left = found.length  # of it those bytes count that are found again
        out.seek(self._end() if self._run else self.index.at + RUN_HEAD_BYTES)
        runs_on = not piece.first or (piece.goes_on and self._run is None)
        if not runs_on or len(piece.text) > self._left or out.read(len(piece.text)) != piece.text:
            return False
        self._left -= len(piece.text)
        self._grow(piece)
        return True

    def add(self, block: Sequence[Piece], stored: Sequence[Stored]) -> None:
        """Append the records of a block."""
        for piece, own in zip(block, stored):
            if own.kind == RAW and (piece.goes_on or not piece.first):
                if self._run is not None and (piece.first or self._run.length + len(piece.text) > MOST_RUN):
                    self._end_run()
                self.out.seek(0, os.SEEK_END)
                if self._run is None:
                    self.out.write(bytes(RUN_HEAD_BYTES))
                # First the text, then the head that counts it: a run that was cut off is a shorter one.
                self.out.write(piece.text)
                self.out.flush()
                self._grow(piece)
                self._write_run_head()
            else:
                head = Head(own.kind, len(piece.text), len(own.payload), own.digest, piece.goes_on, piece.follows)
                self.append(head, own.payload)
        self.out.flush()

    def append(self, head: Head, payload: bytes) -> None:
        """Append a record."""
        self._end_run()
        data = head.to_bytes(self.index.records, self.index.documents) + payload
        self.out.seek(0, os.SEEK_END)
        self.out.write(data)
        self.index.add(head, len(data))

    def finish(self) -> int:
        """Write the index, where there is one, and the header of a whole file; returns the file's size."""
        self._end_run()
        self.out.seek(0, os.SEEK_END)
        tail = self.index.to_bytes(self.header)
        self.out.write(tail)
        self.out.seek(0)
        self.out.write(header_with_index(self.header) if tail else self.header)
        self.out.flush()
        return self.out.seek(0, os.SEEK_END)

    def _grow(self, piece: Piece) -> None:
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

    def _end_run(self) -> None:
        if self._run is not None:
            self._write_run_head()
            self.index.add(self._run, RUN_HEAD_BYTES + self._run.length)
            self._run = None

    def _place(self) -> tuple[int, int]:
        """Number, and document, of the record after those that are there."""
        if self._run is None:
            return self.index.records, self.index.documents
        return self.index.records + 1, self.index.documents + (not self._run.goes_on)

    def _end(self) -> int:
        return self.index.at + (0 if self._run is None else RUN_HEAD_BYTES + self._run.length)
