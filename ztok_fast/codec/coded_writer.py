"""Writing files of coded units (`ztok_fast.codec.container_writer`)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from ztok_fast.codec.coded import ALIGNED, CODED, RAW, Part, Progress, TextCoder
from ztok_fast.codec.coded_file import block_bytes, header_of
from ztok_fast.codec.container_writer import Piece, Stored, Writer, parts_of, pieces_of, write_file
from ztok_fast.codec.documents import digest_of
from ztok_fast.codec.errors import ZFileError
from ztok_fast.codec.varint import varint

_LEAST_SAVED = 30
"""Bytes that a part of a long document has to save, or it is stored raw: its head, and that of a run after it."""


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
    return write_file(
        path,
        parts,
        lambda out: Writer(out, header_of(coder)),
        lambda block: _stored(block, coder, verify, progress),
        block_bytes(coder),
        progress,
    )


def coded_bytes(texts: Sequence[bytes], coder: TextCoder, verify: bool = True) -> list[bytes]:
    """Whole files, in memory, each of one document; their segments are coded side by side."""
    pieces = [list(pieces_of(parts_of(io.BytesIO(text)))) for text in texts]
    block = [piece for own in pieces for piece in own]
    stored = iter(_stored(block, coder, verify, None) if block else ())
    found = []
    for own in pieces:
        out = io.BytesIO(header_of(coder))
        writer = Writer(out, out.getvalue())
        writer.add(own, [next(stored) for _ in own])
        writer.finish()
        found.append(out.getvalue())
    return found


def _stored(block: list[Piece], coder: TextCoder, verify: bool, progress: Progress | None) -> list[Stored]:
    """How the pieces of a block are stored."""
    texts = [piece.text for piece in block]
    parts = coder.encode(texts, None if verify else progress)
    if verify:
        coded = [i for i, part in enumerate(parts) if part.mode in (CODED, ALIGNED)]
        try:
            back = coder.decode([parts[i] for i in coded], [len(texts[i]) for i in coded], progress)
        except ZFileError:
            back = [b""] * len(coded)
        for i, text in zip(coded, back):
            if text != texts[i]:
                warnings.warn("a part did not come back as it was and is stored without the model", stacklevel=2)
                parts[i] = Part(RAW, texts[i])
        if progress:
            progress(sum(map(len, texts)) - sum(len(texts[i]) for i in coded))
    for i, (piece, part) in enumerate(zip(block, parts)):
        size = len(part.payload)
        least = _LEAST_SAVED if piece.goes_on or not piece.first else len(varint(size))
        if part.mode != RAW and size + least > len(piece.text):
            parts[i] = Part(RAW, piece.text)
    return [Stored(part.mode, part.payload, digest_of(text)) for part, text in zip(parts, texts)]
