"""Coded units: text stored exactly, range-coded under a language model's own probabilities.

Each token costs -log2 of the probability that the model gives it (arithmetic coding: Rissanen 1976; with language
models: Delétang et al., arXiv 2309.10668). The model runs in the engine, whose passes have the bits of its steps:
encoding is one packed pass, and decoding, token by token, sees the same counts on any machine (docs/determinism.md).

A part of a text is cut into segments of ``context`` tokens. Each is read on its own, so that the segments of many parts
decode side by side; the model sees at most ``window`` tokens at once (`ztok_fast/codec/reading.py`).
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ztok_fast.codec.aligned_parts import AlignedPart, ZTokenSize, read_aligned
from ztok_fast.codec.base_model import BaseModel, load_base
from ztok_fast.codec.errors import CodecError, ZBatchError, ZFileError
from ztok_fast.codec.layout import offsets
from ztok_fast.codec.reading import Reader
from ztok_fast.codec.text import detokenize, tokenize
from ztok_fast.codec.varint import read_varint, varint
from ztok_fast.codec.windows import Windows
from ztok_fast.engine import Engine
from ztok_fast.ops import decode_tokens, range_decoder, range_encode
from ztok_fast.ops.entropy.range_encode import Streams

DEFAULT_BASE = "mini-base"
PART_BYTES = 1 << 20
"""Most bytes of one part: what bounds the memory, and what a damaged file can ask for."""

CODED, RAW, LZMA, ALIGNED = range(4)
"""How a part is stored: its tokens, its bytes, or its bytes compressed, whichever is smallest; or its tokens in aligned
windows."""

_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": PART_BYTES}]
_MOST_TOKENS = 64
"""Tokens in a byte of a coded part at most: what a damaged count can ask for. Text that takes less is LZMA's."""

_FORMAT = b"ztok coded 1"
Own = TypeVar("Own")
MOST_CONTEXT = 1 << 15
DEFAULT_CONTEXT = DEFAULT_WINDOW = 512
"""The window is what mini-base was trained with."""

Progress = Callable[[int], None]


def identity_of(base: BaseModel, precision: str, context: int, window: int) -> bytes:
    """8 bytes that name all that decoding depends on: model, tokenizer, precision, context, window and format."""
    named = f"{base.fingerprint} {base.tokenizer_fingerprint} {precision} {context}"
    if window < context:
        named += f" {window}"
    return hashlib.sha256(_FORMAT + named.encode()).digest()[:8]


@dataclass(frozen=True)
class Part:
    """A stored part of a text: how, and its bytes."""

    mode: int
    payload: bytes


class TextCoder:
    """Encodes texts exactly under a base model.

    Args:
        base: the model and its tokenizer, which must have a start token (bos).
        precision: "int8" or "float32", the engine's arithmetic.
        context: tokens of one segment, a power of two. Longer ones take fewer bits, and fewer of them decode side by
            side.
        rows: segments that are decoded side by side.
        window: tokens that the model sees at most, a power of two; where a segment is longer, the last quarter of them
            is read again. More than the model was trained with takes more bits, not fewer.

    Raises:
        CodecError: a base without a start token, sizes below 1.
        EngineUnsupported: the engine does not run this base model, or not on this processor.
    """

    def __init__(
        self,
        base: BaseModel,
        precision: str = "int8",
        context: int = DEFAULT_CONTEXT,
        rows: int = 128,
        window: int = DEFAULT_WINDOW,
    ) -> None:
        sizes = (("context", context, MOST_CONTEXT), ("window", window, MOST_CONTEXT), ("rows", rows, 1 << 12))
        for name, value, most in sizes:
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise CodecError(f"{name}: expected an integer from 1 to {most}, got {value!r}")
            if name != "rows" and value & (value - 1):
                raise CodecError(f"{name}: expected a power of two, got {value}")
        if base.bos_token_id is None:
            raise CodecError(f"base model {base.name!r}: expected a tokenizer with a start token (bos), got none")
        self.base, self.context, self.rows, self.window = base, context, rows, min(context, window)
        self.engine = Engine.from_model(base.model, None, precision, slots=rows, capacity=self.window)
        self.reader = Reader(self.engine, base.bos_token_id, rows, self.window)
        self.identity = identity_of(base, precision, context, self.window)
        self.size: ZTokenSize | None = None

    def aligned(self, size: ZTokenSize) -> TextCoder:
        """A coder that stores tokens in aligned windows of this size; what any coder has stored, both read.

        Raises:
            CodecError: a size that no Z-token can have.
        """
        found = copy(self)
        found.size = size.check(self.engine.settings.vocabulary)
        return found

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | None = None,
        precision: str = "int8",
        context: int = DEFAULT_CONTEXT,
        rows: int = 128,
        window: int = DEFAULT_WINDOW,
    ) -> TextCoder:
        """With a base model by name or folder (`load_base`); ``None`` is the one that ships, mini-base."""
        return cls(load_base(str(base or DEFAULT_BASE)), precision, context, rows, window)

    @torch.inference_mode()
    def encode(self, texts: Sequence[bytes], progress: Progress | None = None) -> list[Part]:
        """Store texts of at most `PART_BYTES` bytes each; ``progress`` is told the bytes just finished."""
        tokens = self.tokens(texts)
        segments = [own[i : i + self.context] for own in tokens if own for i in range(0, len(own), self.context)]
        store = self._coded_parts if self.size is None else self._aligned_parts
        stored, parts = iter(store(segments, [len(own) for own in tokens if own])), []
        for text, own in zip(texts, tokens):
            found = [Part(RAW, text)]
            if own:
                part = next(stored)
                if len(own) <= _MOST_TOKENS * len(part.payload):
                    found.append(part)
            if found[-1].mode != ALIGNED:  # which is wanted for its windows, and not for its size
                found.append(Part(LZMA, lzma.compress(text, lzma.FORMAT_RAW, filters=_LZMA)))
            parts.append(min(found, key=lambda part: len(part.payload)))
            if progress:
                progress(len(text))
        return parts

    def _coded_parts(self, segments: Sequence[Sequence[int]], lengths: Sequence[int]) -> Iterator[Part]:
        """Texts of so many tokens as streams, one for each segment."""
        streams, _ = self.streams(segments)
        for length, own in zip(lengths, self._of_texts(streams, lengths)):
            yield Part(CODED, varint(length) + b"".join(varint(len(s)) for s in own[:-1]) + b"".join(own))

    def _aligned_parts(self, segments: Sequence[Sequence[int]], lengths: Sequence[int]) -> Iterator[Part]:
        """As `_coded_parts`, as windows."""
        assert self.size is not None
        windows = Windows(self.reader, self.engine.settings.vocabulary, self.size.values).encode(segments)
        for length, own in zip(lengths, self._of_texts(windows, lengths)):
            numbers = [[number for number, _ in segment] for segment in own]
            yield Part(ALIGNED, AlignedPart(self.size, length, numbers).to_bytes())

    def _of_texts(self, segments: list[Own], lengths: Sequence[int]) -> Iterator[list[Own]]:
        """What belongs to the segments of each text."""
        at = 0
        for length in lengths:
            count = -(-length // self.context)
            yield segments[at : at + count]
            at += count

    @torch.inference_mode()
    def decode(self, parts: Sequence[Part], lengths: Sequence[int], progress: Progress | None = None) -> list[bytes]:
        """The texts of stored parts.

        Args:
            lengths: bytes of each text, at most `PART_BYTES`.

        Raises:
            ZFileError: a part is damaged. Whoever keeps a hash of the text compares it.
        """
        segments: list[tuple[int, int, bytes]] = []  # part, tokens, stream
        for index, (part, length) in enumerate(zip(parts, lengths)):
            if part.mode == CODED:
                segments += [(index, count, stream) for count, stream in self.read_segments(part.payload, length)]

        def ended(which: Tensor) -> None:
            if progress is None:
                return
            for index in which.tolist():
                part, count, _ = segments[index]
                progress(_share(lengths[part], count, index, segments))

        written = self.read_streams([stream for _, _, stream in segments], [count for _, count, _ in segments], ended)
        tokens = self._aligned_tokens(parts, lengths)
        for (index, _, _), own in zip(segments, written):
            tokens.setdefault(index, []).extend(own)
        texts = []
        for index, (part, length) in enumerate(zip(parts, lengths)):
            if part.mode in (CODED, ALIGNED):
                text = detokenize(self.base.tokenizer, tokens.get(index, []))
            else:
                text = part.payload if part.mode == RAW else _unpacked(part.payload, length)
            if part.mode != CODED and progress:
                progress(length)
            if len(text) != length:
                raise ZFileError(f"part {index}: expected {length} bytes, got {len(text)}: the file is damaged")
            texts.append(text)
        return texts

    def _aligned_tokens(self, parts: Sequence[Part], lengths: Sequence[int]) -> dict[int, list[int]]:
        """The tokens of the parts that are aligned, by their place."""
        vocabulary, found = self.engine.settings.vocabulary, dict[int, list[int]]()
        read: dict[ZTokenSize, list[tuple[int, int, list[int]]]] = {}
        for index, (part, length) in enumerate(zip(parts, lengths)):
            if part.mode == ALIGNED:
                own = self.read_aligned(part.payload, length)
                counts = [min(self.context, own.tokens - i) for i in range(0, own.tokens, self.context)]
                read.setdefault(own.size, []).extend((index, *segment) for segment in zip(counts, own.windows))
        for size, segments in read.items():
            windows = Windows(self.reader, vocabulary, size.values)
            try:
                written = windows.decode([own for _, _, own in segments], max(count for _, count, _ in segments))
            except ZBatchError as error:
                raise ZFileError(f"aligned part: {error}") from error
            for (index, count, _), tokens in zip(segments, written):
                if len(tokens) != count:
                    raise ZFileError(f"aligned part: expected {count} tokens of a segment, got {len(tokens)}: damaged")
                found.setdefault(index, []).extend(tokens)
        return found

    def tokens(self, texts: Sequence[bytes]) -> list[list[int]]:
        """The tokens of every text; none where they do not stand for its very bytes."""
        valid = []
        for text in texts:
            try:
                valid.append(text.decode())
            except UnicodeDecodeError:
                valid.append("")
        found = [own.tolist() for own in tokenize(self.base.tokenizer, valid)]
        return [own if detokenize(self.base.tokenizer, own) == text else [] for own, text in zip(found, texts)]

    def streams(self, segments: Sequence[Sequence[int]]) -> tuple[list[bytes], Tensor]:
        """A stream of the range coder for each segment, and the bits of every token, float64."""
        intervals = self.reader.intervals(segments)
        lengths = torch.tensor([len(segment) for segment in segments], dtype=torch.int64)
        bits = (intervals.total.double() / intervals.size.double()).log2()
        return range_encode(*intervals, offsets(lengths)).to_bytes(), bits

    def read_streams(
        self, streams: Sequence[bytes], counts: Sequence[int], ended: Callable[[Tensor], None] = lambda segments: None
    ) -> list[list[int]]:
        """The tokens of streams, so many of each; ``ended`` is told which streams have just ended."""
        data, cu_bytes = Streams.from_bytes(streams)
        decoder = range_decoder(data, cu_bytes)

        def choose(logits: Tensor, running: Tensor) -> tuple[Tensor, Tensor]:
            tokens, state = decode_tokens(logits, decoder[running], data)
            decoder[running] = state
            return tokens, torch.zeros(len(running), dtype=torch.bool)

        written, _ = self.reader.write(torch.tensor(counts, dtype=torch.int64), choose, ended)
        return [row[:count] for row, count in zip(written.tolist(), counts)]

    def read_aligned(self, payload: bytes, length: int) -> AlignedPart:
        """The windows of an aligned part of ``length`` bytes, not decoded."""
        most = min(length, _MOST_TOKENS * len(payload))
        return read_aligned(payload, most, self.context, self.engine.settings.vocabulary)

    def read_segments(self, payload: bytes, length: int) -> list[tuple[int, bytes]]:
        """Token counts and streams of a coded part of ``length`` bytes."""
        total, at = read_varint(payload, 0)
        # A token is at least one byte of text.
        most = min(length, _MOST_TOKENS * len(payload))
        if not 1 <= total <= most:
            raise ZFileError(f"coded part: expected 1 to {most} tokens, got {total}: the file is damaged")
        counts = [min(self.context, total - i) for i in range(0, total, self.context)]
        sizes = []
        for _ in counts[1:]:
            size, at = read_varint(payload, at)
            sizes.append(size)
        sizes.append(len(payload) - at - sum(sizes))
        if sizes[-1] < 0:
            raise ZFileError(f"coded part: expected streams of {len(payload) - at} bytes, got more: it is damaged")
        found = []
        for count, size in zip(counts, sizes):
            found.append((count, payload[at : at + size]))
            at += size
        return found


def _share(length: int, count: int, index: int, segments) -> int:
    """Bytes that a segment stands for in the progress, about; those of a part add up to its length."""
    part = segments[index][0]
    first = index
    while first and segments[first - 1][0] == part:
        first -= 1
    before = sum(segments[i][1] for i in range(first, index))
    after = index + 1
    rest = 0
    while after < len(segments) and segments[after][0] == part:
        rest += segments[after][1]
        after += 1
    total = before + count + rest
    return length * (before + count) // total - length * before // total


def _unpacked(payload: bytes, length: int) -> bytes:
    try:
        # No distance is longer than the text: its length is dictionary enough.
        filters = [{**_LZMA[0], "dict_size": max(4096, length)}]
        reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
        return reader.decompress(payload, length + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise ZFileError(f"compressed part: {error}: the file is damaged") from error
