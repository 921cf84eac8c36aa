"""Writing files of learned units: a text as it is read, block by block, or a batch that is in memory."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ztok_fast.codec import learned_records as records
from ztok_fast.codec.batch_checks import check_fits
from ztok_fast.codec.coded import Progress
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.container import LEARNED_FORM, NO_DOCUMENT, Head
from ztok_fast.codec.container_writer import BLOCK_BYTES, Piece, Stored, Writer, write_file
from ztok_fast.codec.errors import LossyTextWarning, ZFileError
from ztok_fast.codec.learned_file import digest_for, identity_of, is_of
from ztok_fast.codec.zbatch import ZBatch
from ztok_fast.files import replace_atomically

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec


@dataclass
class Written:
    """What `write_learned` has written in this run; the documents of an interrupted one are not among them.

    Attributes:
        tokens: of the text; ztokens: Z-tokens.
        bits, bits_exact: as `ZBatch.rate` and `ZBatch.rate_exact` count them, of all tokens.
        size: bytes of the file; resumed: bytes of text that an interrupted run had stored.
    """

    tokens: int = 0
    ztokens: int = 0
    bits: float = 0.0
    bits_exact: float = 0.0
    size: int = 0
    resumed: int = 0


def write_learned(
    path: str | Path,
    parts: Iterable[tuple[bytes, bool]],
    codec: ZTokCodec,
    ratio: float = 4,
    exact: bool = False,
    *,
    verify: bool = True,
    progress: Progress | None = None,
    **choices: Any,
) -> Written:
    """Compress the parts of documents (`parts_of`, one document after another) into a file, in constant memory.

    A part is compressed on its own. After an interruption the same call goes on from what is there, if ratio, exact
    and choices are the same, and gives the same bytes.

    Args:
        path: file to write. While it is written its name ends in ``.partial``.
        ratio, exact, verify: as in `ZTokCodec.compress`; so are choices: ``levels``, ``fixed_units``, and ``keep`` and
            ``question``, which are of every part.
        progress: called with the bytes of text just finished.

    Raises:
        CodecError: there is no document, or the last one is said to go on.
        ValueError: as of `ZTokCodec.compress`.

    Warns:
        LossyTextWarning: as of `ZTokCodec.compress`, with the numbers of documents in the file.
    """
    ratio = codec.config.check_ratio(ratio)
    header = _header(codec.fingerprint, codec.engine)
    settings = repr((float(ratio), bool(exact), sorted(choices.items())))
    written = Written()

    def skipped(size: int) -> None:
        written.resumed += size
        if progress:
            progress(size)

    def store(block: list[Piece]) -> list[Stored]:
        z = _compressed(codec, block, ratio, exact, verify, choices, progress)
        written.tokens, written.ztokens = written.tokens + z.tokens, written.ztokens + z.ztokens
        if z.tokens:
            written.bits, written.bits_exact = (
                written.bits + z.rate * z.tokens,
                written.bits_exact + z.rate_exact * z.tokens,
            )
        prior = codec.streams.write(z)
        stored = []
        for number, (piece, one) in enumerate(zip(block, z)):
            kind, payload = records.write_document(one, codec.config, None if prior is None else prior[number])
            stored.append(Stored(kind, payload, digest_for(kind, len(piece.text), payload, piece.text)))
        return stored

    written.size = write_file(
        path, parts, lambda out: Writer(out, header, settings.encode(), is_of), store, BLOCK_BYTES, skipped
    )
    return written


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
    header = _header(z.codec_fingerprint, z.precision, NO_DOCUMENT * (not len(z)))
    out = io.BytesIO(header)
    writer = Writer(out, header)
    for number, one in enumerate(z):
        info = one.documents[0]
        kind, payload = records.write_document(one, config, None if prior is None else prior[number])
        length = info.byte_length or 0
        digest = bytes.fromhex(info.digest) if info.digest else digest_for(kind, length, payload, b"")
        writer.append(Head(kind, length, len(payload), digest, False, number < len(z) - 1), payload)
    writer.finish()
    with replace_atomically(path) as temporary:
        temporary.write_bytes(out.getvalue())


def _header(fingerprint: str, precision: str, flags: int = 0) -> bytes:
    return LEARNED_FORM.magic + bytes([LEARNED_FORM.version << 4 | flags]) + identity_of(fingerprint, precision)


def _compressed(
    codec: ZTokCodec,
    block: list[Piece],
    ratio: float,
    exact: bool,
    verify: bool,
    choices: dict[str, Any],
    progress: Progress | None,
) -> ZBatch:
    texts = [piece.text for piece in block]
    count = None
    if progress:
        # The codec counts tokens, each once compressed and, in exact mode, once verified.
        tokens = codec.tokenize([text.decode("utf-8", "replace") for text in texts])
        count = _InBytes(progress, sum(map(len, texts)), (1 + exact) * sum(map(len, tokens)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LossyTextWarning)
        z = codec.compress(texts, ratio, exact, verify=verify, progress=count, **choices)
    for one in caught:
        if isinstance(one.message, LossyTextWarning):
            lost = [block[i] for i in one.message.documents]
            numbers = sorted({piece.document for piece in lost})
            warnings.warn(LossyTextWarning(numbers, lost[0].start + one.message.first_byte), stacklevel=4)
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if count:
        count.finish()
    return z


class _InBytes:
    """Turns progress in tokens of a block into progress in its bytes."""

    def __init__(self, progress: Progress, size: int, tokens: int) -> None:
        self._progress, self._size, self._tokens = progress, size, tokens
        self._done = self._told = 0

    def __call__(self, tokens: int) -> None:
        self._done += tokens
        self._tell(self._size * self._done // max(1, self._tokens))

    def finish(self) -> None:
        self._tell(self._size)

    def _tell(self, size: int) -> None:
        if size > self._told:
            self._progress(size - self._told)
            self._told = size
