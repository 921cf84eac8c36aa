"""Answers to questions from Z-tokens, beside answers from the full text and from as many positions of other kinds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch

from ztok_fast.codec.continuation import check_count
from ztok_fast.codec.errors import LossyTextWarning
from ztok_fast.evaluation.contexts import ANSWER_WAYS, DECOMPRESSED, FULL, ZTOKENS, Contexts, answer_ways_of
from ztok_fast.evaluation.questions import Item, exact_match, interval, items_of, token_f1
from ztok_fast.evaluation.readers import SEQUENCES, BaseReader, InferencerReader, Reader, reader_of
from ztok_fast.evaluation.sample import Sample

if TYPE_CHECKING:
    from ztok_fast.codec.base_model import BaseModel
    from ztok_fast.codec.codec import ZTokCodec


@dataclass(frozen=True)
class AnswerScore:
    """How well questions are answered from what one way leaves of their texts. docs/evaluation.md has more.

    Attributes:
        way: what is read; reader: who reads it; asked: the ratio that was asked for.
        items: questions; positions: rows that stand for a text, on average.
        f1, exact_match: means over the questions, 0 to 1; f1_low, f1_high: the bootstrap interval of F1, 95 %.
        of_full: F1 as a share of that of the full text, with its interval over the same draws of questions; ``None``
            where the full text is not asked, has an F1 of 0 (in some draws), or a reader on another base reads it.
        same_texts: share of the texts that are read as they were; of the full text and of what was decompressed.
        answers: to every question.
    """

    way: str
    reader: str
    asked: float
    items: int
    positions: float
    f1: float
    f1_low: float
    f1_high: float
    exact_match: float
    of_full: float | None
    of_full_low: float | None
    of_full_high: float | None
    same_texts: float | None
    answers: tuple[str, ...] = field(repr=False)

    def to_dict(self) -> dict:
        """All numbers, without the answers."""
        return {name: value for name, value in asdict(self).items() if name != "answers"}


def evaluate_answers(
    codec: ZTokCodec,
    items: Sequence[Mapping | Item],
    ratio: float = 4,
    *,
    reader: str | BaseModel | ZTokCodec | InferencerReader | BaseReader | None = None,
    ways: Sequence[str] | None = None,
    max_new_tokens: int = 24,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[AnswerScore]:
    """Greedy answers to questions about texts, by what is left of the texts.

    Example::

        codec = ztok_fast.ZTokCodec.from_pretrained("ztok-mini")
        items = [{"text": "Ada Berg opened the bridge.", "question": "Who opened the bridge?", "answer": "Ada Berg"}]
        for score in ztok_fast.evaluate_answers(codec, items, ratio=4):
            print(score.way, score.f1)

    Args:
        items: rows with ``text``, ``question``, and ``answer`` or a list ``answers``.
        ratio: text tokens per Z-token to ask for.
        reader: who reads all but the Z-tokens, which the codec's own inferencer reads (`ZTokCodec.answer`): a base
            model or its name, a codec whose inferencer reads, or a reader made of one; ``None`` for that of ``codec``.
        ways: some of `ANSWER_WAYS`; ``None`` for all that the codec has.
        max_new_tokens: longest answer; seed: of the bootstrap.
        progress: called with the number of questions that have just been answered one way.

    Raises:
        ValueError: an item without a text, question or answer, a way or ratio that the codec does not have.
    """
    found = items_of(items)
    check_count("max_new_tokens", max_new_tokens)
    ratio = codec.config.check_ratio(ratio)
    wanted = answer_ways_to_run(codec, ways)
    own, other = InferencerReader(codec), reader_of(reader, codec)
    texts = [item.text for item in found]
    sample = Sample.of_texts(codec, texts)
    done: dict[str, AnswerScore] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossyTextWarning)
        contexts = Contexts(sample, codec.compress(texts, ratio), other)
        for way in wanted:
            used: Reader = own if way == ZTOKENS else other
            rows = contexts.rows(way)
            known: list[str | None] = [None] * len(found)
            if way == DECOMPRESSED and FULL in done:
                # The same reader says the same of the same text.
                known = [a if b == t else None for a, b, t in zip(done[FULL].answers, contexts.decompressed, texts)]
            answers = _answers(used, rows, found, known, max_new_tokens, progress)
            same = None
            if way in (FULL, DECOMPRESSED):
                read = texts if way == FULL else contexts.decompressed
                same = sum(a == b for a, b in zip(read, texts)) / len(texts)
            full = done[FULL].answers if FULL in done and used.base == other.base else answers if way == FULL else None
            done[way] = AnswerScore(
                way=way,
                reader=used.name,
                asked=ratio,
                positions=sum(map(len, rows)) / len(rows),
                same_texts=same,
                answers=tuple(answers),
                **_scores(found, answers, full, seed),
            )
    return list(done.values())


def _answers(reader: Reader, rows, items: Sequence[Item], known, max_new_tokens: int, progress) -> list[str]:
    """An answer to every item, of those that are not known yet by the reader."""
    answers, open_items = list(known), [index for index, answer in enumerate(known) if answer is None]
    if progress and len(open_items) < len(items):
        progress(len(items) - len(open_items))
    for first in range(0, len(open_items), SEQUENCES):
        part = open_items[first : first + SEQUENCES]
        given = reader.answer([rows[i] for i in part], [items[i].question for i in part], max_new_tokens)
        for index, answer in zip(part, given):
            answers[index] = answer
        if progress:
            progress(len(part))
    return answers


def _scores(items: Sequence[Item], answers: Sequence[str], full: Sequence[str] | None, seed: int) -> dict:
    """What answers are worth, and beside those from the full text."""
    f1 = _f1_of(items, answers)
    low, high = interval(lambda draws: f1[draws].mean(1), len(items), seed)
    found = {
        "items": len(items),
        "f1": float(f1.mean()),
        "f1_low": low,
        "f1_high": high,
        "exact_match": sum(exact_match(a, item.answers) for a, item in zip(answers, items)) / len(items),
        **dict.fromkeys(("of_full", "of_full_low", "of_full_high")),
    }
    best = None if full is None else _f1_of(items, full)
    if best is not None and best.any():
        found["of_full"] = float(f1.mean() / best.mean())
        low, high = interval(lambda draws: f1[draws].mean(1) / best[draws].mean(1), len(items), seed)
        # Where so few answers are right that some draws have none from the full text, there are no bounds.
        if math.isfinite(low) and math.isfinite(high):
            found |= {"of_full_low": low, "of_full_high": high}
    return found


def _f1_of(items: Sequence[Item], answers: Sequence[str]) -> torch.Tensor:
    return torch.tensor([token_f1(a, item.answers) for a, item in zip(answers, items)], dtype=torch.float64)


def answer_ways_to_run(codec: ZTokCodec, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The ways that are asked for, in the order of `ANSWER_WAYS`; ``None`` for all that the codec has.

    Raises:
        ValueError: a way that the codec does not have.
    """
    have = answer_ways_of(codec)
    for way in wanted or ():
        if way not in have:
            raise ValueError(f"ways: expected some of {', '.join(have)}, got {way!r}")
    return tuple(way for way in ANSWER_WAYS if way in (have if wanted is None else wanted))
