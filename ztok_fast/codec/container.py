"""The container of `.ztok` files: a header, records, a part of a document each, and the index over them.

Coded units and learned units are in it, each a `Form` of its own. docs/file-format.md lays out the bytes. Every count
is checked against the file's size before memory is taken for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ztok_fast.codec.coded import ALIGNED, CODED, LZMA, PART_BYTES, RAW
from ztok_fast.codec.documents import HASH_BYTES, digest_of
from ztok_fast.codec.errors import ZFileError
from ztok_fast.codec.varint import MOST_BYTES, read_varint, varint


class Form(NamedTuple):
    """A kind of file: what it holds, how it begins, and the version of its layout."""

    units: str
    magic: bytes
    version: int


CODED_FORM, LEARNED_FORM = Form("coded", b"ZC", 2), Form("learned", b"ZL", 2)

INDEXED = 128
"""In the header's third byte: the file ends with an index."""

NO_DOCUMENT = 1
"""There too, of learned units: a file that was cut off is not to look like one without documents."""

IDENTITY_BYTES = 8
HEADER_BYTES = 2 + 1 + IDENTITY_BYTES

LEAST_LEARNED = 16
"""The kinds of learned units' records (`ztok_fast.codec.learned_records`) begin here."""

RUN = 15
"""Text stored as it is, longer than a part: its record grows while it is written, and its length has a fixed place."""
RUN_LENGTH_BYTES = 5
RUN_HEAD_BYTES = 1 + RUN_LENGTH_BYTES + HASH_BYTES
MOST_RUN = (1 << 8 * RUN_LENGTH_BYTES) - 1

STRETCH = 256
"""Records that share an entry of the index: whoever looks for a document reads so many heads at most."""

_GOES_ON, _FOLLOWS, _KIND = 128, 64, 63
_MOST_HEAD = 1 + 2 * MOST_BYTES + HASH_BYTES
_LENGTH_BYTES = 4


class Head(NamedTuple):
    """What stands before the bytes of a record.

    Attributes:
        kind: how it is stored: `CODED`, `RAW`, `LZMA`, `ALIGNED` or `RUN`, or a kind of learned units.
        length: bytes of text; stored: bytes of the record after this head.
        digest: 8 bytes, of coded units `digest_of` the text.
        goes_on: the document has another record; follows: the file has another record.
    """

    kind: int
    length: int
    stored: int
    digest: bytes
    goes_on: bool
    follows: bool

    def to_bytes(self, number: int, document: int) -> bytes:
        """As record ``number`` of a file, of its document ``document``."""
        first = bytes([self.kind | self.goes_on * _GOES_ON | self.follows * _FOLLOWS])
        digest = _bound(self.digest, number, document, self.goes_on, self.follows)
        if self.kind == RUN:
            return first + self.length.to_bytes(RUN_LENGTH_BYTES, "little") + digest
        # What is stored raw is as long as the text, and a record that is alone has the rest of the file.
        stated = b"" if self.kind == RAW or is_alone(number, self.follows) else varint(self.stored)
        return first + varint(self.length) + digest + stated


def is_alone(number: int, follows: bool) -> bool:
    """Whether a record is its file's only one."""
    return number == 0 and not follows


def _bound(digest: bytes, number: int, document: int, goes_on: bool, follows: bool) -> bytes:
    """A hash that holds at one place of a file only, so that records cannot change places; its own inverse."""
    turned = int.from_bytes(document.to_bytes(HASH_BYTES, "little"), "big")  # far from the number of the record
    mask = turned ^ (number << 2 | goes_on << 1 | follows)
    return (int.from_bytes(digest, "little") ^ mask).to_bytes(HASH_BYTES, "little")


def read_head(stream: BinaryIO, number: int, document: int, end: int, form: Form) -> Head:
    """The head of record ``number``, of document ``document``; the stream is left where what is stored begins.

    Args:
        end: bytes of the file.

    Raises:
        ZFileError: the file ends, or there is no record.
    """
    start = stream.tell()
    data = stream.read(_MOST_HEAD)
    if not data:
        raise ZFileError(f"record {number}: expected a record, got the end: the file is truncated")
    kind, goes_on, follows = data[0] & _KIND, bool(data[0] & _GOES_ON), bool(data[0] & _FOLLOWS)
    learned = form is LEARNED_FORM
    if learned and kind < LEAST_LEARNED:
        raise ZFileError(f"record {number}: expected a document of learned units, got kind {kind}: it is damaged")
    if not learned and kind not in (CODED, RAW, LZMA, ALIGNED, RUN):
        raise ZFileError(f"record {number}: expected a kind of storage of 0 to 3 or 15, got {kind}: it is damaged")
    if goes_on and not follows:
        raise ZFileError(f"record {number}: expected the document to go on, got the last record: it is damaged")
    if kind == RUN:
        length, at = int.from_bytes(data[1 : 1 + RUN_LENGTH_BYTES], "little"), 1 + RUN_LENGTH_BYTES
    else:
        length, at = read_varint(data, 1)
    digest, at = data[at : at + HASH_BYTES], at + HASH_BYTES
    if len(digest) < HASH_BYTES:
        raise ZFileError(f"record {number}: expected a hash of {HASH_BYTES} bytes, got the end: the file is truncated")
    if kind in (RAW, RUN):
        stored = length
    elif is_alone(number, follows):
        stored = end - start - at
    else:
        stored, at = read_varint(data, at)
    if not learned and (kind != RUN and length > PART_BYTES or stored > length):
        raise ZFileError(
            f"record {number}: expected at most {PART_BYTES} bytes, got {length} in {stored}: it is damaged"
        )
    if stored > end - start - at:
        raise ZFileError(
            f"record {number}: expected {stored} bytes, got {end - start - at}: the file is truncated or damaged"
        )
    stream.seek(start + at)
    return Head(kind, length, stored, _bound(digest, number, document, goes_on, follows), goes_on, follows)


class Index:
    """Where the records of a file begin: one entry for `STRETCH` of them.

    Attributes:
        records: of the file so far; documents: that end in them; text: their bytes of text; at: where the next begins.
        before: documents, bytes of text and place in the file where each stretch begins.
    """

    def __init__(self) -> None:
        self.records = self.documents = self.text = 0
        self.at = HEADER_BYTES
        self.before = [(0, 0, HEADER_BYTES)]

    def add(self, head: Head, size: int) -> None:
        """Count a record of ``size`` bytes in the file."""
        self.records += 1
        self.documents += not head.goes_on
        self.text += head.length
        self.at += size
        if self.records % STRETCH == 0:
            self.before.append((self.documents, self.text, self.at))

    def go_back(self, to: Index) -> None:
        """Forget the records after those of an earlier `copy`."""
        self.records, self.documents, self.text, self.at = to.records, to.documents, to.text, to.at
        del self.before[1 + self.records // STRETCH :]

    def copy(self) -> Index:
        """The counts so far, without the list of stretches."""
        found = Index()
        found.records, found.documents, found.text, found.at = self.records, self.documents, self.text, self.at
        return found

    def to_bytes(self, header: bytes) -> bytes:
        """What a file with this header ends with; nothing where there are few records."""
        if self.records <= STRETCH:
            return b""
        # An entry for each stretch that another record follows: after the last entry there is one at least.
        begins = self.before[: (self.records - 1) // STRETCH + 1]
        entries = b"".join(
            varint(after - own) for here, there in zip(begins, begins[1:]) for own, after in zip(here, there)
        )
        digest = digest_of(header_with_index(header) + entries)
        return entries + digest + len(entries).to_bytes(_LENGTH_BYTES, "little")

    def at_stretch(self, number: int) -> Index:
        """As it was before a stretch, without the list of those before."""
        found = Index()
        found.documents, found.text, found.at = self.before[number]
        found.records = number * STRETCH
        return found

    def stretch_of(self, ended: int) -> int:
        """The stretch in which so many documents have ended."""
        return bisect_left(self.before, ended, key=lambda own: own[0]) - 1

    @staticmethod
    def load(stream: BinaryIO, header: bytes, end: int) -> Index:
        """The index at the end of a file, without the records after the last entry.

        Raises:
            ZFileError: it is damaged.
        """
        tail = HASH_BYTES + _LENGTH_BYTES
        stream.seek(max(HEADER_BYTES, end - tail))
        data = stream.read(tail)
        size = int.from_bytes(data[HASH_BYTES:], "little")
        if len(data) < tail or size > end - tail - HEADER_BYTES:
            raise ZFileError(f"index: expected {size} bytes and {tail}, got fewer: the file is truncated or damaged")
        stream.seek(end - tail - size)
        entries = stream.read(size)
        if digest_of(header + entries) != data[:HASH_BYTES]:
            raise ZFileError("index: expected the hash that the file states, got another: it is truncated or damaged")
        found, at = Index(), 0
        while at < size:
            documents, at = read_varint(entries, at)
            text, at = read_varint(entries, at)
            length, at = read_varint(entries, at)
            found.records += STRETCH
            found.documents, found.text, found.at = found.documents + documents, found.text + text, found.at + length
            found.before.append((found.documents, found.text, found.at))
            if documents > STRETCH or found.at > end - tail - size:
                raise ZFileError(f"index: expected at most {STRETCH} documents in records before it, got more: damaged")
        return found


def header_with_index(header: bytes) -> bytes:
    return header[:2] + bytes([header[2] | INDEXED]) + header[3:]


def has_documents(header: bytes) -> bool:
    """Whether a file with this header has any; one of coded units always has."""
    return not (header.startswith(LEARNED_FORM.magic) and header[2] & NO_DOCUMENT)


def form_of(path: str | Path) -> Form | None:
    """The form of an existing file by how it begins; ``None`` if it is no `.ztok` file."""
    with open(path, "rb") as stream:
        begin = stream.read(HEADER_BYTES)
    return next((form for form in (CODED_FORM, LEARNED_FORM) if begin.startswith(form.magic)), None)


def read_header(stream: BinaryIO, form: Form) -> bytes:
    """The header at the beginning of a file.

    Raises:
        ZFileError: the file is of another kind or version.
    """
    head = stream.read(HEADER_BYTES)
    if not head.startswith(form.magic) or len(head) < HEADER_BYTES:
        other = " (coded units are text for storage: decompress the file)" if head.startswith(CODED_FORM.magic) else ""
        raise ZFileError(f"expected a whole file of {form.units} units, got another kind{other}")
    version = head[2] >> 4 & 7
    if version != form.version or (form is LEARNED_FORM and head[2] & 15 & ~NO_DOCUMENT):
        raise ZFileError(f"expected version {form.version} of {form.units} units, got {version}")
    return head


def read_records(stream: BinaryIO, index: Index, end: int, form: Form, whole: bool = True) -> Iterator[Head]:
    """The heads of the records from here on. The stream is behind each; whoever wants what is stored reads it.

    Args:
        index: of the records before; each is counted in it before its head is given.
        end: bytes of the file.
        whole: to the last record, and not only to the end of this document.
    """
    while True:
        start = stream.tell()
        head = read_head(stream, index.records, index.documents, end, form)
        after = stream.tell() + head.stored
        index.add(head, after - start)
        yield head
        stream.seek(after)
        if not head.follows or not (whole or head.goes_on):
            return


def check_end(stream: BinaryIO, header: bytes, index: Index) -> None:
    """Raise `ZFileError` unless the file ends here, with the index of the records that were read where it has one."""
    indexed = bool(header[2] & INDEXED)
    expected = index.to_bytes(header) if indexed else b""
    found = stream.read(len(expected) + 1)
    if indexed != (index.records > STRETCH) or found != expected:
        raise ZFileError(f"record {index.records}: expected the end of the file, got more, or a wrong index")
