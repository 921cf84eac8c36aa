"""Who answers questions: a codec's inferencer, or a language model of its own; each reads rows of input embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from ztok_fast.codec.adapters import AdaptedBase
from ztok_fast.codec.base_model import BaseModel, load_base
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.continuation import answer_from_rows
from ztok_fast.codec.decoding import write_answer
from ztok_fast.codec.layout import offsets
from ztok_fast.codec.runtime import EngineRuntime, FloatRuntime, Runtime
from ztok_fast.codec.text import detokenize, tokenize
from ztok_fast.engine import Engine, EngineUnsupported

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec

SEQUENCES = 16
"""Questions that are answered side by side."""

EXAMPLES = (
    ("The bridge was opened in 1932 by Anna Berg, after nine years.", "Who opened the bridge?", "Anna Berg"),
    ("In spring the herds move to the lakes of Ombar, where 4,000 animals graze.", "How many animals graze?", "4,000"),
    ("Marie Holt studied chemistry in Graz and taught in Linz.", "Where did Marie Holt study?", "Graz"),
)
"""What a language model is shown first, so that it answers with a few words: text, question, answer."""


class Reader(Protocol):
    """Answers questions about what it reads.

    Attributes:
        name: for tables; base: the fingerprint of its base model.
    """

    name: str
    base: str

    def tokenize(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """The tokens of every text, without special ones."""

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Input embeddings ``[n, D]`` of tokens."""

    def answer(self, rows: Sequence[torch.Tensor], questions: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers, each from its own ``[k, D]`` rows, which may be none."""


class InferencerReader:
    """The inferencer of a codec, which was trained on Z-tokens or, to compare, on text."""

    def __init__(self, codec: ZTokCodec, name: str = "inferencer") -> None:
        self.codec, self.name, self.base = codec, name, codec.base.fingerprint

    def tokenize(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return list(self.codec.tokenize(texts))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.codec.model.adapted.embedding(tokens.to(self.codec.model.device))

    def answer(self, rows: Sequence[torch.Tensor], questions: Sequence[str], max_new_tokens: int) -> list[str]:
        codec = self.codec
        codec._engines.use()
        cu = offsets(torch.tensor([len(own) for own in rows], device=codec.model.device))
        written = answer_from_rows(codec.model, torch.cat(list(rows)), cu, codec.tokenize(questions), max_new_tokens)
        return [codec._text_bytes(own).decode("utf-8", "replace").strip() for own in written]


class BaseReader:
    """A language model that goes on after `EXAMPLES`, a text and a question, without a chat template.

    In one, small models answer with whole sentences, of which F1 makes little.

    Args:
        base: it must be this reader's alone. precision: of the engine; where the engine cannot run the model, or for
            ``"float"``, transformers does.
    """

    def __init__(self, base: BaseModel, precision: str = "int8") -> None:
        self.name, self.base, self.tokenizer = base.name, base.fingerprint, base.tokenizer
        # Adapters are made only because the runtimes expect them; the bare model answers.
        self.adapted = AdaptedBase(base.model, ZTokConfig(base_model=base.name, segment_length=8, lora_rank=1))
        self.runtime = self._runtime(precision)
        newline = tokenize(self.tokenizer, ["\n"])[0]
        self.end_tokens = {*self.adapted.end_tokens, *newline[-1:]}
        if base.eos_token_id is not None:
            self.end_tokens.add(base.eos_token_id)

    def _runtime(self, precision: str) -> Runtime:
        if precision != "float":
            try:
                engine = Engine.from_model(self.adapted.peft, None, precision, slots=1, capacity=16)
                return EngineRuntime(self.adapted, engine)
            except EngineUnsupported:
                pass
        return FloatRuntime(self.adapted)

    def tokenize(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return list(tokenize(self.tokenizer, texts))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.adapted.embedding(tokens)

    @torch.inference_mode()
    def answer(self, rows: Sequence[torch.Tensor], questions: Sequence[str], max_new_tokens: int) -> list[str]:
        parts = []
        for own, question in zip(rows, questions):
            before, after = (torch.tensor(list(t), dtype=torch.int64) for t in self._prompt(question, len(own) > 0))
            parts.append(torch.cat([self.embed(before), own, self.embed(after)]))
        cu = offsets(torch.tensor([len(own) for own in parts]))
        positions = torch.cat([torch.arange(len(own)) for own in parts])
        written = write_answer(
            self.runtime, torch.cat(parts), positions, cu, max_new_tokens, self.end_tokens, adapter=None
        )
        texts = [detokenize(self.tokenizer, own).decode("utf-8", "replace").strip() for own in written]
        return [text.split("\n")[0].strip() for text in texts]

    def _prompt(self, question: str, with_text: bool) -> list[Sequence[int]]:
        """The tokens before what is read, and those after it. Without a text, there is none in the examples either."""
        opening, asking = ("Text:\n", "\n\nQuestion: {}\nAnswer:") if with_text else ("", "Question: {}\nAnswer:")
        parts = [self.tokenizer.bos_token or ""]
        for text, asked, answer in EXAMPLES:
            parts += [opening, text if with_text else "", asking.format(asked), f" {answer}\n\n"]
        prompt = "".join([*parts, opening]), asking.format(question)
        return [self.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in prompt]


def reader_of(
    reader: str | BaseModel | ZTokCodec | InferencerReader | BaseReader | None, codec: ZTokCodec
) -> InferencerReader | BaseReader:
    """The reader of all that is not Z-tokens.

    Args:
        reader: a base model or its name, a codec whose inferencer reads; ``None`` for the inferencer of ``codec``.

    Raises:
        ValueError: anything else. BaseModelError: no such base model.
    """
    from ztok_fast.codec.codec import ZTokCodec

    if reader is None:
        return InferencerReader(codec)
    if isinstance(reader, (InferencerReader, BaseReader)):
        return reader
    if isinstance(reader, ZTokCodec):
        return InferencerReader(reader, "inferencer" if reader is codec else "other inferencer")
    if isinstance(reader, str):
        reader = load_base(reader)
    if not isinstance(reader, BaseModel):
        raise ValueError(f"reader: expected a base model, its name, a codec or None, got {type(reader).__name__}")
    return BaseReader(reader, codec.engine)
