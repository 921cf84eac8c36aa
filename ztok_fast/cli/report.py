"""How results are printed: numbers, aligned tables, and text marked by unit or by mistake."""

from __future__ import annotations

import math
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence

WIDTH = 96
"""Columns that marked text is folded to; a terminal folds coloured text itself."""

_UNIT_COLOURS = ("\033[30;48;5;153m", "\033[30;48;5;223m", "\033[30;48;5;157m")
_WRONG = "\033[37;41m"
_RESET = "\033[0m"


def number(value: float | None, digits: int = 2) -> str:
    """``value`` with ``digits`` decimals; ``-`` where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def pairs(rows: Sequence[tuple[str, object]]) -> str:
    """Aligned lines of a name and a value."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """An aligned table; the first ``left`` columns are flush left, the others flush right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def use_colour() -> bool:
    """Whether stdout is a terminal whose user has not asked for plain text (the NO_COLOR convention)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def token_texts(tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds; joined they are the decoded text.

    A token that ends inside a character adds nothing and the one that completes it adds the character. Tokens
    are decoded with the one before, since some tokenizers write the first token of a text without its space.
    """

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts, context, done = [], 0, 0
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[context:end])
        unfinished = text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens) and end - done < 8
        if unfinished:
            texts.append("")
            continue
        before = decode(tokens[context:done]) if done > context else ""
        texts.append(text[len(before) :])
        context, done = done, end
    return texts


def mark_units(texts: Sequence[str], unit_lengths: Sequence[int], colour: bool) -> str:
    """The text with its units told apart: by colour, or by a ``|`` after each.

    Args:
        texts: of every token; unit_lengths: tokens of every unit, which may cover only the first of ``texts``.
    """
    parts, at = [], 0
    for index, length in enumerate(unit_lengths):
        text = "".join(texts[at : at + length])
        if colour:
            parts.append(f"{_UNIT_COLOURS[index % len(_UNIT_COLOURS)]}{text}{_RESET}")
        else:
            line = text.rstrip("\n")  # a mark at the end of a line is easier to read than one at the start of the next
            parts.append(f"{line}|{text[len(line) :]}")
        at += length
    return "".join(parts)


def mark_wrong(texts: Sequence[str], wrong: Sequence[bool], colour: bool) -> str:
    """The text with runs of wrong tokens in red, or in braces."""
    parts, inside = [], False
    for text, is_wrong in zip(texts, wrong):
        if is_wrong != inside:
            parts.append((_WRONG if is_wrong else _RESET) if colour else ("{" if is_wrong else "}"))
            inside = is_wrong
        parts.append(text)
    if inside:
        parts.append(_RESET if colour else "}")
    return "".join(parts)


def fold(text: str, colour: bool, indent: str = "  ") -> str:
    """Lines of at most `WIDTH` columns, indented; coloured text as it is."""
    if colour:
        return text
    lines = []
    for line in text.splitlines() or [""]:
        lines += textwrap.wrap(
            line, WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=True, break_on_hyphens=False
        ) or [""]
    return "\n".join(lines)


def length_histogram(lengths: Counter[int]) -> str:
    """How many units there are of every length, such as ``1: 40  2: 12``."""
    return "  ".join(f"{length}: {lengths[length]:,}" for length in sorted(lengths)) or "-"


def show_units(tokenizer, tokens: list[int], unit_lengths: list[int], most: int) -> None:
    """Print a text with its units told apart, its first ``most`` tokens."""
    shown, covered = 0, 0
    for length in unit_lengths:
        if most and covered + length > most:
            break
        shown, covered = shown + 1, covered + length
    colour = use_colour()
    texts = token_texts(tokenizer, tokens[:covered])
    print(fold(mark_units(texts, unit_lengths[:shown], colour), colour))
    if covered < len(tokens):
        print(f"  ... and {len(tokens) - covered:,} more tokens (--tokens 0 shows all)")
