"""Questions about texts: what an item is, and how answers are scored."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

RESAMPLES = 2000
"""Draws of a bootstrap interval, which holds the middle 95 % of them."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Item:
    """A question about a text, and its right answers, at least one."""

    text: str
    question: str
    answers: tuple[str, ...]


def items_of(rows: Sequence[Mapping | Item]) -> list[Item]:
    """Items from rows with ``text``, ``question`` and ``answer`` (a string) or ``answers`` (a list of them).

    Raises:
        ValueError: no row, or one without these.
    """
    if isinstance(rows, (str, bytes, Mapping)):
        raise ValueError(f"items: expected a list of rows, got one {type(rows).__name__}")
    found = [row if isinstance(row, Item) else _item(row, f"items[{index}]") for index, row in enumerate(rows)]
    if not found:
        raise ValueError("items: expected at least one row with a question, got none")
    return found


def _item(row: object, where: str) -> Item:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected a row with text, question and answer, got {type(row).__name__}")
    for name in ("text", "question"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"{where}: {name}: expected a string that is not empty, got {row.get(name)!r:.80}")
    answers = row["answers"] if row.get("answers") is not None else [row.get("answer")]
    if not isinstance(answers, (list, tuple)) or not answers or not all(isinstance(a, str) and a for a in answers):
        raise ValueError(f"{where}: answer: expected a string, or answers, a list of at least one, got {answers!r:.80}")
    return Item(row["text"], row["question"], tuple(answers))


# Scores


def normalised(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 where the answer is one of the right ones, else 0."""
    return float(normalised(answer) in {normalised(one) for one in right})


def token_f1(answer: str, right: Sequence[str]) -> float:
    """F1 of the words of an answer, against the right answer that it is nearest to."""
    return max(_f1(normalised(answer).split(), normalised(one).split()) for one in right)


def _f1(answer: list[str], right: list[str]) -> float:
    if not answer or not right:
        return float(answer == right)
    shared = sum((Counter(answer) & Counter(right)).values())
    return 2 * shared / (len(answer) + len(right))


def interval(statistic: Callable[[torch.Tensor], torch.Tensor], count: int, seed: int) -> tuple[float, float]:
    """The middle 95 % of a statistic over items drawn anew with replacement.

    Args:
        statistic: gives ``[n]`` numbers for n draws, int64 ``[n, count]`` indices of items.
        seed: equal seeds draw the same items, so that ways are compared on the same ones.
    """
    draws = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    low, high = torch.quantile(statistic(draws).double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
