"""The codec: text in, Z-tokens out, text back; answers and continuations from Z-tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from ztok_fast.codec import exact as exact_mode
from ztok_fast.codec.base_model import BaseModel, load_base
from ztok_fast.codec.batch_checks import check_fits
from ztok_fast.codec.byte_loss import warn_of_lost_bytes
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.continuation import answer_question, check_count, continue_ztokens
from ztok_fast.codec.errors import CodecError
from ztok_fast.codec.layout import offsets
from ztok_fast.codec.model import ZTokModel
from ztok_fast.codec.passes import Progress, Window, compress_windows, decompress_windows, window_tokens
from ztok_fast.codec.weights import codec_fingerprint, copy_state, load_weights, save_weights
from ztok_fast.codec.zbatch import DocumentInfo, ZBatch

MODELS = Path(__file__).resolve().parent.parent / "models"
"""Codecs that ship with the package, by folder name."""

DEFAULT_CODEC = "ztok-mini"


class ZTokCodec:
    """A frozen language model with three LoRA adapters, a quantiser and heads (arXiv:2603.25340).

    Example::

        codec = ZTokCodec.from_pretrained("ztok-mini")
        z = codec.compress(["It was a bright cold day in April."], ratio=2, exact=True)
        texts = codec.decompress(z)

    Args:
        base: the loaded base model; config: the codec's settings. Weights are fresh: see :meth:`from_pretrained`.
    """

    def __init__(self, base: BaseModel, config: ZTokConfig) -> None:
        self.base, self.config = base, config
        self.tokenizer = base.tokenizer
        self.model = ZTokModel(base.model, config).eval()
        self._fingerprint: str | None = None

    # Files

    @classmethod
    def from_pretrained(cls, path: str | Path = DEFAULT_CODEC, base: BaseModel | str | None = None) -> ZTokCodec:
        """Load a codec from a folder, or one that ships with the package by its name.

        The base model is, in this order: ``base``; the codec folder's own ``base/``; what its settings name,
        found locally, on the hub, or in an installed package.

        Raises:
            CodecError: no such codec, or the base model is not the one that the codec was trained on.
            ConfigError, WeightsError, BaseModelError: a file is missing or damaged, no base model is found.
        """
        folder = Path(path)
        if not folder.is_dir():
            folder = MODELS / str(path)
        if not (folder / "config.json").is_file():
            shipped = sorted(p.parent.name for p in MODELS.glob("*/config.json"))
            raise CodecError(f"codec {str(path)!r}: expected a codec folder or one of {shipped}, got neither")
        config = ZTokConfig.load(folder)
        state = load_weights(folder)
        if base is None:
            name = str(folder / "base") if (folder / "base").is_dir() else config.base_model
            base = load_base(name, expected_fingerprint=config.base_fingerprint or None)
        elif not isinstance(base, BaseModel):
            base = load_base(base)
        if config.base_fingerprint and base.fingerprint != config.base_fingerprint:
            raise CodecError(
                f"base model {base.name!r}: expected the one with fingerprint {config.base_fingerprint[:16]}... "
                f"({config.base_model}), on which codec {str(path)!r} was trained, got {base.fingerprint[:16]}..."
            )
        codec = cls(base, config)
        codec.load_state(state)
        return codec

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write settings, adapters, codebooks, projections and heads; nothing of the base model.

        Args:
            dtype: cast the weights, e.g. to ``torch.bfloat16`` for shipping; ``None`` keeps every bit.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(folder, self.model.codec_state(), dtype)
        self.config.save(folder)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Replace the codec's weights by those of ``state``; names and shapes must be this codec's."""
        copy_state(self.model.codec_state(), state)
        self._fingerprint = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of settings and weights; a ``.ztok`` file carries that of the codec that made it."""
        if self._fingerprint is None:
            self._fingerprint = codec_fingerprint(self.config, self.model.codec_state())
        return self._fingerprint

    def to(self, device) -> ZTokCodec:
        self.model.to(device)
        return self

    # Text to Z-tokens

    def compress(
        self,
        texts: Sequence[str | bytes],
        ratio: float = 4,
        exact: bool = False,
        *,
        levels: int | None = None,
        fixed_units: bool | None = None,
        batch_tokens: int = 8192,
        progress: Progress | None = None,
    ) -> ZBatch:
        """Compress documents.

        Args:
            texts: documents; ``bytes`` that are not UTF-8 come back byte for byte in exact mode only.
            ratio: text tokens per Z-token to aim at, 1 to ``config.max_unit_length``.
            exact: decompress while compressing and store corrections, so that what comes back is the input.
            levels: residual levels to use, 1 to ``config.num_codebooks``; ``None`` for all.
            fixed_units: ``True`` for one Z-token for every ``ratio`` tokens, ``False`` for units by learned halting mass;
                ``None`` as the codec is configured.
            batch_tokens: text tokens of one pass; bounds the memory.
            progress: called with the number of text tokens just finished; ``exact`` finishes each token twice, once
                compressed and once verified.

        Raises:
            ValueError: a text that is no string, a ratio or level count that this codec cannot give.

        Warns:
            LossyTextWarning: without ``exact``, tokens cannot represent every byte of a document.
        """
        ratio = self.config.check_ratio(ratio)
        originals, contents = self._contents(texts)
        check_count("batch_tokens", batch_tokens)
        if levels is not None:
            if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= self.config.num_codebooks:
                raise CodecError(f"levels: expected an integer from 1 to {self.config.num_codebooks}, got {levels!r}")
        documents = self._tokenize(contents)
        if not exact:
            warn_of_lost_bytes(originals, map(self._text_bytes, documents))
        limit = window_tokens(self.model)
        pieces = [[d[i : i + limit] for i in range(0, len(d), limit)] for d in documents]
        flat = [p for own in pieces for p in own]
        windows = compress_windows(
            self.model,
            flat,
            ratio,
            fixed_units=fixed_units,
            levels=levels,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        infos = [
            DocumentInfo(
                tokens=len(tokens),
                budget=ratio,
                levels=levels or self.config.num_codebooks,
                sha256=hashlib.sha256(original).hexdigest(),
                byte_length=len(original),
            )
            for tokens, original in zip(documents, originals)
        ]
        if exact:
            corrections = exact_mode.find_corrections(
                self.model, windows, flat, batch_tokens=batch_tokens, progress=progress
            )
            at = 0
            for info, own, tokens, original in zip(infos, pieces, documents, originals):
                positions, values = exact_mode.join(corrections[at : at + len(own)], [len(p) for p in own])
                at += len(own)
                info.corrections = exact_mode.document_corrections(
                    positions, values, self._text_bytes(tokens), original
                )
        return self._zbatch(windows, [len(own) for own in pieces], infos)

    def _contents(self, texts) -> tuple[list[bytes], list[str]]:
        if isinstance(texts, (str, bytes)):
            raise CodecError(f"texts: expected a list of strings, got one {type(texts).__name__}; put it in a list")
        originals, contents = [], []
        for index, text in enumerate(texts):
            if not isinstance(text, (str, bytes)):
                raise CodecError(f"texts[{index}]: expected a string or bytes, got {type(text).__name__}")
            original = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
            originals.append(original)
            contents.append(original.decode("utf-8", "replace"))
        return originals, contents

    def _tokenize(self, contents: list[str]) -> list[list[int]]:
        if not contents:
            return []
        return self.tokenizer(contents, add_special_tokens=False, verbose=False)["input_ids"]

    def _text_bytes(self, tokens: list[int]) -> bytes:
        text = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.encode("utf-8", "surrogatepass")

    def _zbatch(self, windows: list[Window], windows_per_document: list[int], infos: list[DocumentInfo]) -> ZBatch:
        width = self.config.num_codebooks
        segments = torch.tensor([u for w in windows for u in w.units], dtype=torch.int64)
        segments_of_window = [len(w.units) for w in windows]
        per_document, at = [], 0
        for count in windows_per_document:
            per_document.append(sum(segments_of_window[at : at + count]))
            at += count
        return ZBatch(
            codes=torch.cat([torch.zeros(0, width, dtype=torch.int32), *(w.codes for w in windows)]),
            unit_lengths=torch.cat([torch.zeros(0, dtype=torch.int32), *(w.lengths for w in windows)]),
            cu_segments=offsets(segments),
            cu_documents=offsets(torch.tensor(per_document, dtype=torch.int64)),
            documents=infos,
            codec_fingerprint=self.fingerprint,
            codebook_size=self.config.codebook_size,
            max_unit_length=self.config.max_unit_length,
        ).validate()

    # Z-tokens to text

    def decompress(self, z: ZBatch, *, batch_segments: int = 128, progress: Progress | None = None) -> list[str]:
        """The texts of a batch. Exact where it was compressed with ``exact=True``, else the model's best guess.

        Raises:
            ZBatchError: the batch is damaged or another codec made it.
            ExactMismatchError: exact mode, and what came back is not the original.
        """
        return [_as_text(data) for data in self.decompress_bytes(z, batch_segments=batch_segments, progress=progress)]

    def decompress_bytes(
        self, z: ZBatch, *, batch_segments: int = 128, progress: Progress | None = None
    ) -> list[bytes]:
        """:meth:`decompress`, each document as bytes (UTF-8 unless the original was not)."""
        tokens = self.decompress_tokens(z, batch_segments=batch_segments, progress=progress)
        results = []
        for info, own in zip(z.documents, tokens):
            corrections = info.corrections
            if corrections is None:
                results.append(self._text_bytes(own))
                continue
            data = corrections.raw if corrections.raw is not None else corrections.restore(self._text_bytes(own))
            info.verify(data)
            results.append(data)
        return results

    def decompress_tokens(
        self, z: ZBatch, *, batch_segments: int = 128, progress: Progress | None = None
    ) -> list[list[int]]:
        """The text tokens of every document; a document whose original is stored raw gives none."""
        self._check(z)
        check_count("batch_segments", batch_segments)
        windows, forced, counts = [], [], []
        for index, info in enumerate(z.documents):
            raw = info.corrections is not None and info.corrections.raw is not None
            own = [] if raw else self.windows_of(z[index])
            counts.append(len(own))
            windows += own
            forced += exact_mode.split(info.corrections, [sum(w.segment_lengths) for w in own])
        pieces = decompress_windows(self.model, windows, forced, batch_segments=batch_segments, progress=progress)
        results, at = [], 0
        for count in counts:
            results.append([t for piece in pieces[at : at + count] for t in piece])
            at += count
        return results

    def windows_of(self, z: ZBatch) -> list[Window]:
        """The windows of a batch of one document."""
        units, bounds, windows = z.cu_segments.diff().tolist(), z.cu_segments.tolist(), []
        step = self.config.window_segments
        for first in range(0, len(units), step):
            last = min(first + step, len(units))
            rows = slice(bounds[first], bounds[last])
            windows.append(Window(z.codes[rows], z.unit_lengths[rows], units[first:last]))
        return windows

    def _check(self, z: ZBatch) -> None:
        if not isinstance(z, ZBatch):
            raise CodecError(f"z: expected a ZBatch, got {type(z).__name__}")
        z.validate().check_codec(self.fingerprint)
        check_fits(z, self.config, self.model.adapted.embedding.weight.shape[0])

    # Z-space

    def generate(
        self,
        z: ZBatch,
        max_new_ztokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        end_threshold: float | None = None,
    ) -> ZBatch:
        """Continue every document in Z-space: new Z-tokens alone, ready to decompress.

        The same seed gives the same continuation of a document, whatever else is in the batch.

        Args:
            temperature: 0 for the likeliest codes; top_p: nucleus restriction of every draw.
            end_threshold: ``None`` draws end-of-Z like a code; a probability in (0, 1] ends a document where
                end-of-Z is at least that likely, whatever is drawn (halting mode "stop").

        Raises:
            ValueError: a count under 1, a number out of its range, a batch of another codec.
        """
        self._check(z)
        windows, infos = continue_ztokens(self.model, z, max_new_ztokens, temperature, top_p, seed, end_threshold)
        return self._zbatch(windows, [1 if w.units else 0 for w in windows], infos)

    def answer(self, z: ZBatch, question: str | Sequence[str], max_new_tokens: int = 32) -> str | list[str]:
        """Answer a question from the Z-tokens alone.

        Args:
            question: one question for all documents, or one for each; a batch of one document and one
                question give one string, otherwise a list.

        Raises:
            ValueError: as many questions as documents are not given, or a batch of another codec.
        """
        self._check(z)
        single = isinstance(question, str) and len(z) == 1
        questions = [question] * len(z) if isinstance(question, str) else list(question)
        if len(questions) != len(z) or not all(isinstance(q, str) for q in questions):
            raise CodecError(f"question: expected one string, or one for each of {len(z)} documents, got {question!r}")
        check_count("max_new_tokens", max_new_tokens)
        written = answer_question(self.model, z, self._tokenize(questions), max_new_tokens)
        answers = [self._text_bytes(t).decode("utf-8", "replace").strip() for t in written]
        return answers[0] if single else answers


def _as_text(data: bytes) -> str:
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogateescape")


__all__ = ["DEFAULT_CODEC", "MODELS", "ZTokCodec"]
