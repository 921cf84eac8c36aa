"""Coded units in memory: texts as numbers of a fixed size, Z-tokens that hold the text exactly, under a base model."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ztok_fast.codec.aligned_parts import ZTokenSize
from ztok_fast.codec.coded import ALIGNED, TextCoder
from ztok_fast.codec.coded_file import CodedFile, stored_parts
from ztok_fast.codec.coded_writer import write_coded
from ztok_fast.codec.container_writer import parts_of
from ztok_fast.codec.documents import DocumentInfo, digest_of
from ztok_fast.codec.errors import CodecError, ZBatchError, ZFileError
from ztok_fast.codec.layout import offsets
from ztok_fast.codec.text import detokenize
from ztok_fast.codec.windows import Windows
from ztok_fast.codec.ztokens import ZDocuments


@dataclass(eq=False, kw_only=True)
class CodedUnits(ZDocuments):
    """Documents as coded units. `achieved_ratio`, `rate` and the units are those of a `ZBatch`.

    A Z-token is a *window*: a number below V^L of the coded text, written as L codes to the base V, the most
    significant first. ``unit_lengths`` are the text tokens that end in each window. They are no part of the rate: the
    codes give the text, and with it the lengths.

    Attributes:
        documents: what is known of each document beside its codes.
        identity: of the coder, hexadecimal (`TextCoder.identity`).
        codebook_size: V.
        aligned: a window ends at the end of a token, so that the first windows of a segment give its first tokens. Else
            the windows of a segment are one stream, which has no waste.
    """

    identity: str
    codebook_size: int
    aligned: bool

    @property
    def rate(self) -> float:
        """Bits per text token, K·L·log2 V / N; NaN for N = 0. It is all that there is: the text is exact."""
        bits = self.ztokens * self.num_codebooks * math.log2(self.codebook_size)
        return bits / self.tokens if self.tokens else math.nan

    rate_exact = rate

    def head(self, ztokens: int) -> CodedUnits:
        """The first Z-tokens of every document: its beginning, as documents without a hash. Aligned units only.

        Raises:
            ZBatchError: the units are a stream, whose first windows end within a token.
        """
        if not self.aligned:
            raise ZBatchError("head: expected aligned units, got a stream, which is read as a whole")
        if isinstance(ztokens, bool) or not isinstance(ztokens, int) or ztokens < 0:
            raise ZBatchError(f"ztokens: expected an integer of at least 0, got {ztokens!r}")
        rows: list[int] = []
        segments: list[int] = []
        counts, infos = [], []
        cu, bounds = self.cu_segments.tolist(), self.cu_documents.tolist()
        for info, first, last in zip(self.documents, bounds, bounds[1:]):
            end = min(cu[first] + ztokens, cu[last])
            kept = [min(cu[s + 1], end) - cu[s] for s in range(first, last) if cu[s] < end]
            rows += range(cu[first], end)
            segments += kept
            counts.append(len(kept))
            tokens = int(self.unit_lengths[cu[first] : end].sum())
            infos.append(info if end == cu[last] else DocumentInfo(tokens, info.budget, info.levels))
        chosen = torch.tensor(rows, dtype=torch.int64)
        return replace(
            self,
            codes=self.codes[chosen],
            unit_lengths=self.unit_lengths[chosen],
            cu_segments=offsets(torch.tensor(segments, dtype=torch.int64)),
            cu_documents=offsets(torch.tensor(counts, dtype=torch.int64)),
            documents=infos,
        )


class UnitCoder:
    """Texts to `CodedUnits` and back.

    Args:
        coder: codes text under a base model.
        levels: codes of a Z-token, L. codebook_size: entries of a code, V. A Z-token has L·log2 V bits, at most 63, and
            more values than the base model has tokens.

    Raises:
        CodecError: a Z-token of too many or too few values.
    """

    def __init__(self, coder: TextCoder, levels: int = 4, codebook_size: int = 2048) -> None:
        vocabulary = coder.engine.settings.vocabulary
        self.size = ZTokenSize(levels, codebook_size).check(vocabulary)
        self.coder, self.levels, self.codebook_size = coder, levels, codebook_size
        self._windows = Windows(coder.reader, vocabulary, self.size.values)
        self._bits = self.size.values.bit_length() - 1  # of a stream in a window

    @torch.inference_mode()
    def compress(self, texts: Sequence[str | bytes], aligned: bool = False) -> CodedUnits:
        """Documents as coded units.

        Args:
            texts: documents. aligned: windows end with a token; see `CodedUnits`.

        Raises:
            CodecError: a text that is no string, or whose tokens do not stand for its very bytes. Files keep such
                texts too (`write_coded`).
        """
        originals = [_as_bytes(index, text) for index, text in enumerate(texts)]
        tokens = self.coder.tokens(originals)
        for index, (original, own) in enumerate(zip(originals, tokens)):
            if original and not own:
                raise CodecError(f"texts[{index}]: expected text that the base model's tokens can represent, got other")
        context = self.coder.context
        segments = [own[i : i + context] for own in tokens for i in range(0, len(own), context)]
        windows = self._windows.encode(segments) if aligned else self._cut(segments)
        numbers = [number for own in windows for number, _ in own]
        lengths = torch.tensor([length for own in windows for _, length in own], dtype=torch.int32)
        counts = torch.tensor([-(-len(own) // context) for own in tokens], dtype=torch.int64)
        return CodedUnits(
            codes=self._codes(numbers),
            unit_lengths=lengths,
            cu_segments=offsets(torch.tensor([len(own) for own in windows], dtype=torch.int64)),
            cu_documents=offsets(counts),
            documents=[
                DocumentInfo(len(own), 1, self.levels, digest_of(original).hex(), len(original))
                for own, original in zip(tokens, originals)
            ],
            identity=self.coder.identity.hex(),
            codebook_size=self.codebook_size,
            aligned=aligned,
        )

    def save(self, units: CodedUnits, path: str | Path) -> int:
        """Write the texts of units to a file of their form (docs/file-format.md); returns its size in bytes.

        The units are decoded, and the texts are coded again: `write_coded` with `TextCoder.aligned` takes texts.

        Raises:
            CodecError: there is no document. ZBatchError, ExactMismatchError: as of `decompress`.
        """
        parts = (part for text in self.decompress(units) for part in parts_of(io.BytesIO(text)))
        return write_coded(path, parts, self.coder.aligned(self.size) if units.aligned else self.coder)

    def load(self, path: str | Path) -> CodedUnits:
        """The documents of a file as units, which are aligned where the file's are.

        Raises:
            ZFileError: the file is damaged, of another coder, or has Z-tokens of another size.
            CodecError: a document is no text that tokens can represent; `CodedFile` reads such files.
        """
        own, aligned = unit_coder_of(path, self.coder)
        if aligned and own.size != self.size:
            raise ZFileError(
                f"{path}: expected Z-tokens of {self.levels} codes from {self.codebook_size}, got {own.levels} from "
                f"{own.codebook_size}"
            )
        with CodedFile(path, self.coder) as file:
            return self.compress(list(file), aligned)

    def decompress(self, units: CodedUnits) -> list[bytes]:
        """The texts.

        Raises:
            ZBatchError: another coder made the units, or they are damaged.
            ExactMismatchError: what came back is not the original, whose hash the units have.
        """
        texts = [detokenize(self.coder.base.tokenizer, own) for own in self.decompress_tokens(units)]
        for info, text in zip(units.documents, texts):
            if info.digest is not None:
                info.verify(text)
        return texts

    @torch.inference_mode()
    def decompress_tokens(self, units: CodedUnits) -> list[list[int]]:
        """The text tokens of every document."""
        self._check(units)
        numbers, cu = self._numbers(units.codes), units.cu_segments.tolist()
        windows = [numbers[a:b] for a, b in zip(cu, cu[1:])]
        if units.aligned:
            found = self._windows.decode(windows, self.coder.context)
        else:
            found = self._join(windows, units)
        bounds = units.cu_documents.tolist()
        documents = [[t for own in found[a:b] for t in own] for a, b in zip(bounds, bounds[1:])]
        for index, (info, own) in enumerate(zip(units.documents, documents)):
            if len(own) != info.tokens:
                raise ZBatchError(f"document {index}: expected {info.tokens} tokens, got {len(own)}: it is damaged")
        return documents

    def _check(self, units: CodedUnits) -> None:
        if not isinstance(units, CodedUnits):
            raise CodecError(f"units: expected CodedUnits, got {type(units).__name__}")
        own = (self.coder.identity.hex(), self.codebook_size, self.levels)
        got = (units.identity, units.codebook_size, units.num_codebooks)
        if got != own:
            raise ZBatchError(
                f"units: expected those of coder {own[0]}, {own[1]}^{own[2]}, got {got[0]}, {got[1]}^{got[2]}"
            )
        codes = units.codes
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ZBatchError(f"codes: expected 0 to {self.codebook_size - 1}, got others")

    def _cut(self, segments: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
        """The stream of every segment cut into windows, each with the number of tokens that end in it."""
        streams, bits = self.coder.streams(segments)
        found, at, size = [], 0, self._bits
        for stream, segment in zip(streams, segments):
            whole = int.from_bytes(stream, "big")
            count = max(1, -(-8 * len(stream) // size))
            whole <<= count * size - 8 * len(stream)
            ends = (bits[at : at + len(segment)].cumsum(0) / size).long().clamp(max=count - 1)
            at += len(segment)
            lengths = ends.bincount(minlength=count).tolist()
            found.append([(whole >> (count - 1 - i) * size & (1 << size) - 1, n) for i, n in enumerate(lengths)])
        return found

    def _join(self, windows: Sequence[Sequence[int]], units: CodedUnits) -> list[list[int]]:
        """The inverse of `_cut`."""
        counts = units.cu_text.diff().tolist()
        streams = []
        for own in windows:
            whole = 0
            for number in own:
                whole = whole << self._bits | number
            size = len(own) * self._bits
            streams.append((whole << -size % 8).to_bytes(-(-size // 8), "big"))
        return self.coder.read_streams(streams, counts)

    def _codes(self, numbers: Sequence[int]) -> torch.Tensor:
        left, codes = torch.tensor(numbers, dtype=torch.int64), []
        for _ in range(self.levels):
            codes.append(left % self.codebook_size)
            left = left // self.codebook_size
        return torch.stack(codes[::-1], dim=1).int()

    def _numbers(self, codes: torch.Tensor) -> list[int]:
        whole = torch.zeros(len(codes), dtype=torch.int64)
        for column in codes.long().unbind(1):
            whole = whole * self.codebook_size + column
        return whole.tolist()


def unit_coder_of(path: str | Path, coder: TextCoder) -> tuple[UnitCoder, bool]:
    """What codes the Z-tokens of a file of coded units, and whether they are aligned.

    Raises:
        ZFileError: the file is damaged.
    """
    for head, payload in stored_parts(path):
        if head.kind == ALIGNED:
            try:
                return UnitCoder(coder, *coder.read_aligned(payload, head.length).size), True
            except ZFileError as error:
                raise ZFileError(f"{path}: {error}") from error
    return UnitCoder(coder), False


def _as_bytes(index: int, text: object) -> bytes:
    if not isinstance(text, (str, bytes)):
        raise CodecError(f"texts[{index}]: expected a string or bytes, got {type(text).__name__}")
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
