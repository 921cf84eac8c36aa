"""How results are printed: alignment, marks, and the text of each token."""

import math
from collections import Counter

import pytest
from transformers import AutoTokenizer

from tests.cli.conftest import TOKENIZER
from ztok_fast.cli import report


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  spaces ",
        "plain words, and more.",
        "東京 🙂 café\u200d",
        "\r\n\n\t x",
        "\N{REPLACEMENT CHARACTER}a\N{REPLACEMENT CHARACTER}",
    ],
    ids=ascii,
)
def test_token_texts_join_to_the_text(tokenizer, text):
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = report.token_texts(tokenizer, tokens)
    assert len(texts) == len(tokens)
    assert "".join(texts) == text


def test_token_texts_of_tokens_that_are_no_text(tokenizer):
    """Bytes that never complete a character are shown all the same."""
    half = tokenizer("\U0001f642", add_special_tokens=False)["input_ids"][:1]
    texts = report.token_texts(tokenizer, half * 20)
    assert len(texts) == 20 and "".join(texts) == tokenizer.decode(half * 20)


def test_mark_units():
    assert report.mark_units(["a", "b", "c", "d"], [1, 3], colour=False) == "a|bcd|"
    assert report.mark_units(["a", ".\n\n", "b"], [2, 1], colour=False) == "a.|\n\nb|"
    coloured = report.mark_units(["a", "b", "c"], [2, 1], colour=True)
    first, second = coloured.split(report._RESET)[:2]
    assert first.endswith("ab") and second.endswith("c") and first[:-2] != second[:-1]


def test_mark_wrong_joins_neighbours():
    wrong = [False, True, True, False, True]
    assert report.mark_wrong(["a", "b", "c", "d", "e"], wrong, colour=False) == "a{bc}d{e}"
    assert report.mark_wrong(["a", "b"], [False, False], colour=False) == "ab"
    assert report.mark_wrong(["a", "b"], [False, True], colour=True) == f"a{report._WRONG}b{report._RESET}"


def test_table_aligns_columns():
    assert report.table(["", "n"], [["one", "1"], ["seven", "1,000"]]) == "           n\none        1\nseven  1,000"


def test_numbers_that_are_not_there():
    assert report.number(math.nan) == report.number(None) == report.percent(math.nan) == "-"
    assert report.number(1234.567) == "1,234.57" and report.percent(0.985) == "98.5 %"


def test_fold_keeps_paragraphs_and_width():
    folded = report.fold("word " * 60 + "\n\nlast", colour=False)
    assert max(map(len, folded.splitlines())) <= report.WIDTH
    assert folded.split("\n\n")[1] == "  last"


def test_no_colour_where_it_is_not_wanted(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert report.use_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not report.use_colour()


def test_length_histogram():
    assert report.length_histogram(Counter([1, 3, 1, 2, 1])) == "1: 3  2: 1  3: 1"
    assert report.length_histogram(Counter()) == "-"
