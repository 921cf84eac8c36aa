"""What a user wants kept of a text: spans that are written whatever the ratio, and what a question is about."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ztok_fast.codec.errors import CodecError

Span = tuple[int, int]
"""Characters [start, end) of a text."""

KEPT = 1e6
"""Weight of a token that is written in any case."""

ASKED, NEAR_ASKED, NEAR_TOKENS = 8.0, 4.0, 12
"""Weights of the tokens of a word that a question has too, and of those at most so many tokens away."""

_COMMON = frozenset(
    "a about an and are as at be by did do does for from had has have how in is it its of on or that the their there "
    "they this to was were what when where which who whom whose why will with would you".split()
)
_WORD = re.compile(r"\w+")


def token_weights(
    tokenizer, texts: Sequence[str], keep: Sequence[Sequence[Span]] | None, question: str | Sequence[str] | None
) -> list[torch.Tensor] | None:
    """What each token of every text weighs when slots are short: fp32 ``[N]``, 1 for most, `KEPT` for spans to keep.

    Args:
        keep: spans of each text; question: one for all texts, or one for each. ``None`` and ``None``: no weights.

    Raises:
        CodecError: as many lists of spans, or questions, as texts are expected; a span that is none of the text.
    """
    if keep is None and question is None:
        return None
    questions = [question] * len(texts) if isinstance(question, str) else question
    for name, values in (("keep", keep), ("question", questions)):
        if values is not None and len(values) != len(texts):
            raise CodecError(f"{name}: expected one for each of {len(texts)} texts, got {len(values)}")
    found = []
    for index, text in enumerate(texts):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = torch.tensor(encoded["offset_mapping"], dtype=torch.int64).reshape(-1, 2)
        weights = torch.ones(len(places))
        if questions is not None:
            _raise_for_question(weights, places, text, questions[index], f"question[{index}]")
        for span in [] if keep is None else keep[index]:
            begin, end = _checked(span, len(text), f"keep[{index}]")
            weights[(places[:, 0] < end) & (places[:, 1] > begin)] = KEPT
        found.append(weights)
    return found


def _checked(span: object, length: int, where: str) -> Span:
    if (
        not isinstance(span, (tuple, list))
        or len(span) != 2
        or not all(isinstance(edge, int) and not isinstance(edge, bool) for edge in span)
        or not 0 <= span[0] <= span[1] <= length
    ):
        raise CodecError(f"{where}: expected spans (start, end) of characters within 0 to {length}, got {span!r}")
    return span[0], span[1]


def _raise_for_question(weights: torch.Tensor, places: torch.Tensor, text: str, question: object, where: str) -> None:
    if not isinstance(question, str):
        raise CodecError(f"{where}: expected a string, got {type(question).__name__}")
    asked = {_stem(word) for word in _WORD.findall(question.lower())} - _COMMON
    rows = torch.arange(len(weights))
    hits = [match.span() for match in _WORD.finditer(text.lower()) if _stem(match.group()) in asked]
    for begin, end in hits:
        own = rows[(places[:, 0] < end) & (places[:, 1] > begin)]
        if len(own):
            near = weights[max(0, int(own[0]) - NEAR_TOKENS) : int(own[-1]) + NEAR_TOKENS + 1]
            near.clamp_(min=NEAR_ASKED)
            weights[own] = ASKED


def _stem(word: str) -> str:
    """A word without the commonest endings, so that "measured" meets "measure"."""
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) > len(ending) + 3:
            return word[: -len(ending)]
    return word
