"""The codec: text in, Z-tokens out, text back; answers and continuations from Z-tokens."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, overload

import torch

from ztok_fast.codec import exact as exact_mode
from ztok_fast.codec.base_model import BaseModel, load_base
from ztok_fast.codec.batch_checks import check_fits
from ztok_fast.codec.byte_loss import warn_of_lost_bytes
from ztok_fast.codec.coded import TextCoder
from ztok_fast.codec.coded_units import CodedUnits, UnitCoder
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.continuation import answer_question, check_count, continue_ztokens
from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.documents import DocumentInfo, digest_of
from ztok_fast.codec.engines import AUTO, Engines
from ztok_fast.codec.errors import CodecError, CodedUnitsWarning
from ztok_fast.codec.focus import Span, token_weights
from ztok_fast.codec.learned_file import Reading, load_units
from ztok_fast.codec.learned_writer import save_units
from ztok_fast.codec.models import make_model
from ztok_fast.codec.passes import BATCH_SEGMENTS, BATCH_TOKENS, Progress, compress_documents
from ztok_fast.codec.shipped import codec_folder, shipped_codecs
from ztok_fast.codec.slot_streams import SlotStreams
from ztok_fast.codec.text import as_text, detokenize, originals_and_texts, tokenize
from ztok_fast.codec.weights import codec_fingerprint, copy_state, load_weights, save_weights
from ztok_fast.codec.zbatch import ZBatch
from ztok_fast.codec.ztokens import ZTokens

DEFAULT_CODEC = "ztok-mini"


class ZTokCodec:
    """A frozen language model with three LoRA adapters, a quantiser and heads (arXiv:2603.25340).

    Example::

        codec = ZTokCodec.from_pretrained("ztok-mini")
        z = codec.compress(["It was a bright cold day in April."], ratio=2, exact=True)
        texts = codec.decompress(z)

    Args:
        base: the loaded base model; config: the codec's settings. Weights are fresh: see `from_pretrained`.
        engine: what runs the base model: "int8" or "float32", the engine (docs/engine.md), whose results have the same
            bits everywhere; "float", transformers' modules; "auto", int8 where the engine supports the base model and
            device, else float with an `EngineFallbackWarning`.
    """

    def __init__(self, base: BaseModel, config: ZTokConfig, engine: str = AUTO) -> None:
        self.base, self.config = base, config
        self.tokenizer = base.tokenizer
        self.model = make_model(base.model, config).eval()
        self._engines = Engines(self.model, engine)
        self.streams = SlotStreams(self.model, self._engines)
        self._fingerprint: str | None = None

    # Files

    @classmethod
    def from_pretrained(
        cls, path: str | Path = DEFAULT_CODEC, base: BaseModel | str | None = None, engine: str = AUTO
    ) -> ZTokCodec:
        """Load a codec from a folder, or one that ships with the package by its name.

        The base model is, in this order: ``base``; the codec folder's own ``base/``; what its settings name,
        found locally, among those that ship, on the hub, or in an installed package.

        Raises:
            CodecError: no such codec, or the base model is not the one that the codec was trained on.
            ConfigError, WeightsError, BaseModelError: a file is missing or damaged, no base model is found.
        """
        folder = codec_folder(path)
        if not (folder / "config.json").is_file():
            raise CodecError(f"codec {str(path)!r}: expected a codec folder or one of {shipped_codecs()}, got neither")
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
        codec = cls(base, config, engine)
        codec.load_state(state)
        return codec

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write settings, adapters, codebooks, projections and heads; nothing of the base model.

        Args:
            dtype: cast the weights, e.g. to ``torch.bfloat16`` for shipping; ``None`` keeps every bit.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_weights(Path(folder), self.model.codec_state(), dtype)
        self.config.save(folder)

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Replace the codec's weights by those of ``state``; names and shapes must be this codec's."""
        copy_state(self.model.codec_state(), state)
        self._fingerprint = None

    def save(self, z: ZBatch | CodedUnits, path: str | Path) -> None:
        """Write a ``.ztok`` file (docs/file-format.md); learned units are for this codec alone to read."""
        if isinstance(z, CodedUnits):
            self._coded_units.save(z, path)
        else:
            self._check_batch(z)
            save_units(z, path, self.config, self.streams.write(z))

    def load(self, path: str | Path) -> ZBatch:
        """Read a whole file of learned units (`LearnedFile` reads one document); `ZFileError` says what is wrong."""
        return load_units(path, Reading.of(self))

    def load_coded(self, path: str | Path) -> CodedUnits:
        """Read a whole file of coded units that `save` wrote (`CodedFile` reads one document, of any coder)."""
        return self._coded_units.load(path)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of settings and weights; a ``.ztok`` file carries that of the codec that made it."""
        if self._fingerprint is None:
            self._fingerprint = codec_fingerprint(self.config, self.model.codec_state())
        return self._fingerprint

    @property
    def engine(self) -> str:
        """What `compress` runs the base model with: "int8", "float32" or "float"."""
        return self._engines.use()

    def to(self, device) -> ZTokCodec:
        self.model.to(device)
        return self

    # Text to Z-tokens

    @overload
    def compress(
        self,
        texts: Sequence[str | bytes],
        ratio: float = ...,
        exact: bool = ...,
        *,
        units: Literal["learned"] = ...,
        levels: int | None = ...,
        fixed_units: bool | None = ...,
        keep: Sequence[Sequence[Span]] | None = ...,
        question: str | Sequence[str] | None = ...,
        verify: bool = ...,
        batch_tokens: int = ...,
        progress: Progress | None = ...,
    ) -> ZBatch: ...

    @overload
    def compress(self, texts: Sequence[str | bytes], *, units: Literal["coded"], aligned: bool = ...) -> CodedUnits: ...

    def compress(
        self,
        texts: Sequence[str | bytes],
        ratio: float = 4,
        exact: bool = False,
        *,
        units: str = "learned",
        aligned: bool = False,
        levels: int | None = None,
        fixed_units: bool | None = None,
        keep: Sequence[Sequence[Span]] | None = None,
        question: str | Sequence[str] | None = None,
        verify: bool = True,
        batch_tokens: int = BATCH_TOKENS,
        progress: Progress | None = None,
    ) -> ZBatch | CodedUnits:
        """Compress documents.

        Args:
            texts: documents; ``bytes`` that are not UTF-8 come back byte for byte in exact mode only.
            ratio: text tokens per Z-token to aim at, 1 to ``config.max_unit_length``.
            exact: store what the decompressor would guess wrong, so that what comes back is the input.
            levels: residual levels to use, 1 to ``config.num_codebooks``; ``None`` for all.
            fixed_units: ``True`` for one Z-token for every ``ratio`` tokens, ``False`` for units by learned halting
                mass; ``None`` as the codec is configured.
            keep: with slots, for each text spans (start, end) of characters that are written at any ratio.
            question: with slots, one, or one for each text: where slots are short, they go to what shares its words.
            verify: with ``exact``, decompress what was compressed and compare it.
            batch_tokens: text tokens of one pass; bounds the memory, beside some 16 bytes per text token.
            progress: called with the number of text tokens just finished; ``exact`` finishes each token twice, once
                compressed and once verified (or encoded, without ``verify``).
            units: "learned", Z-tokens that models read; "coded", windows of as many bits of the text itself, coded
                under the base model: exact, for keeping (`CodedUnits`). They take none of the arguments above.
            aligned: of coded units, each window ends with a token; see `CodedUnits`.

        Raises:
            ValueError: a text that is no string, a ratio or level count that this codec cannot give.

        Warns:
            LossyTextWarning: without ``exact``, tokens cannot represent every byte of a document.
            UserWarning: with ``exact``, a document did not come back as it was and is stored as it is.
        """
        if units == "coded":
            if (ratio, exact, levels, fixed_units, keep, question) != (4, False, None, None, None, None):
                raise CodecError("units: expected no ratio, exact or other choices with coded units, got some")
            return self._coded_units.compress(originals_and_texts(texts)[0], aligned)
        if units != "learned" or aligned:
            raise CodecError(f"units: expected learned, or coded where they are aligned, got {units!r}")
        ratio = self.config.check_ratio(ratio)
        originals, contents = originals_and_texts(texts)
        check_count("batch_tokens", batch_tokens)
        if levels is not None:
            if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= self.config.num_codebooks:
                raise CodecError(f"levels: expected an integer from 1 to {self.config.num_codebooks}, got {levels!r}")
            if self.config.emission == "slots" and levels != self.config.num_codebooks:
                raise CodecError(f"levels: expected None, since slots have no levels to leave out, got {levels}")
        weights = token_weights(self.tokenizer, contents, keep, question)
        if weights is not None and self.config.emission != "slots":
            raise CodecError("keep, question: expected neither, since the Z-tokens of this codec name no tokens")
        precision = self._engines.use()
        documents = self.tokenize(contents)
        if not exact:
            warn_of_lost_bytes(originals, map(self._text_bytes, documents))
        limit = self.config.section_tokens
        sections = [d[i : i + limit] for d in documents for i in range(0, len(d), limit)]
        counts = [-(-len(d) // limit) for d in documents]
        if weights is not None:
            weights = [own[i : i + limit] for own in weights for i in range(0, len(own), limit)]
        z = compress_documents(
            self.model,
            sections,
            ratio,
            fixed_units=fixed_units,
            levels=levels,
            weights=weights,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        used = levels or self.config.num_codebooks
        infos = [
            DocumentInfo(len(tokens), ratio, used, digest_of(original).hex() if exact else None, len(original))
            for tokens, original in zip(documents, originals)
        ]
        if exact:
            found = exact_mode.corrections_of(
                self.model, z, sections, counts, batch_tokens=batch_tokens, verify=verify, progress=progress
            )
            for index, (info, own, tokens, original) in enumerate(zip(infos, found, documents, originals)):
                if own is None:
                    warnings.warn(f"texts[{index}] did not come back as it was and is stored as it is", stacklevel=2)
                    info.corrections = Corrections.stored_raw(original)
                else:
                    info.corrections = own.smallest(self._text_bytes(tokens), original)
        return self._zbatch(z.joined(counts), infos, precision)

    @cached_property
    def _coded_units(self) -> UnitCoder:
        return UnitCoder(TextCoder(self.base), self.config.num_codebooks, self.config.codebook_size)

    def tokenize(self, texts: Sequence[str]) -> list[array]:
        """The text tokens of every document, as `compress` sees them: arrays of C ints."""
        return tokenize(self.tokenizer, texts)

    def _text_bytes(self, tokens: Sequence[int]) -> bytes:
        return detokenize(self.tokenizer, tokens)

    def _zbatch(self, z: ZTokens, infos: list[DocumentInfo], precision: str) -> ZBatch:
        return ZBatch(
            **vars(z),
            documents=infos,
            codec_fingerprint=self.fingerprint,
            codebook_size=self.config.codebook_size,
            max_unit_length=self.config.max_unit_length,
            precision=precision,
        ).validate()

    # Z-tokens to text

    def decompress(
        self, z: ZBatch | CodedUnits, *, batch_segments: int = BATCH_SEGMENTS, progress: Progress | None = None
    ) -> list[str]:
        """The texts of a batch. Exact where it was compressed with ``exact=True``, else the model's best guess.

        Raises:
            ZBatchError: the batch is damaged or another codec made it.
            ExactMismatchError: exact mode, and what came back is not the original.
        """
        return [as_text(data) for data in self.decompress_bytes(z, batch_segments=batch_segments, progress=progress)]

    def decompress_bytes(
        self, z: ZBatch | CodedUnits, *, batch_segments: int = BATCH_SEGMENTS, progress: Progress | None = None
    ) -> list[bytes]:
        """`decompress`, each document as bytes (UTF-8 unless the original was not)."""
        if isinstance(z, CodedUnits):
            return self._coded_units.decompress(z)
        tokens, results = self._decompress(z, batch_segments, progress), []
        for info, own in zip(z.documents, tokens):
            text, corrections = self._text_bytes(own), info.corrections
            if corrections is not None:
                text = corrections.raw if corrections.raw is not None else corrections.restore(text)
                info.verify(text)
            results.append(text)
        return results

    def decompress_tokens(
        self, z: ZBatch | CodedUnits, *, batch_segments: int = BATCH_SEGMENTS, progress: Progress | None = None
    ) -> list[list[int]]:
        """The text tokens of every document; a document whose original is stored raw gives none."""
        if isinstance(z, CodedUnits):
            return self._coded_units.decompress_tokens(z)
        return [own.tolist() for own in self._decompress(z, batch_segments, progress)]

    def _decompress(self, z: ZBatch, batch_segments: int, progress: Progress | None) -> list[array]:
        self._check(z)
        check_count("batch_segments", batch_segments)
        stored = [info.corrections for info in z.documents]
        return exact_mode.decode(self.model, z, stored, batch_segments=batch_segments, progress=progress)

    def _check(self, z: ZBatch) -> str:
        """Let the model run as the batch asks for, which must be this codec's; the precision."""
        self._check_batch(z)
        return self._engines.use(z)

    def _check_batch(self, z: ZBatch) -> None:
        if not isinstance(z, ZBatch):
            raise CodecError(f"z: expected a ZBatch, got {type(z).__name__}")
        z.validate().check_codec(self.fingerprint)
        check_fits(z, self.config, self.model.adapted.embedding.weight.shape[0])

    # Z-space

    def _learned(self, what: str, z: ZBatch | CodedUnits) -> ZBatch:
        if not isinstance(z, CodedUnits):
            return z
        warnings.warn(CodedUnitsWarning(what), stacklevel=3)
        return self.compress(self.decompress_bytes(z))

    def generate(
        self,
        z: ZBatch | CodedUnits,
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

        Warns:
            CodedUnitsWarning: coded units are decoded and compressed to learned ones first.
        """
        z = self._learned("generate", z)
        precision = self._check(z)
        new = continue_ztokens(self.model, z, max_new_ztokens, temperature, top_p, seed, end_threshold)
        return self._zbatch(*new, precision)

    def answer(
        self, z: ZBatch | CodedUnits, question: str | Sequence[str], max_new_tokens: int = 32
    ) -> str | list[str]:
        """Answer a question from the Z-tokens alone.

        Args:
            question: one question for all documents, or one for each; a batch of one document and one
                question give one string, otherwise a list.

        Raises:
            ValueError: as many questions as documents are not given, or a batch of another codec.

        Warns:
            CodedUnitsWarning: coded units are decoded and compressed to learned ones first.
        """
        z = self._learned("answer", z)
        self._check(z)
        single = isinstance(question, str) and len(z) == 1
        questions = [question] * len(z) if isinstance(question, str) else list(question)
        if len(questions) != len(z) or not all(isinstance(q, str) for q in questions):
            raise CodecError(f"question: expected one string, or one for each of {len(z)} documents, got {question!r}")
        check_count("max_new_tokens", max_new_tokens)
        written = answer_question(self.model, z, self.tokenize(questions), max_new_tokens)
        answers = [self._text_bytes(t).decode("utf-8", "replace").strip() for t in written]
        return answers[0] if single else answers
