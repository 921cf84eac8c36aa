"""Scores of answers, by hand, and what an item must have."""

import pytest
import torch

from ztok_fast.evaluation.questions import Item, exact_match, interval, items_of, normalised, token_f1

ROW = {"text": "Ada Berg opened it.", "question": "Who opened it?", "answer": "Ada Berg"}


def test_answers_are_compared_as_squad_does():
    assert normalised(" The  U.S. Army, a  (large) one ") == "us army large one"
    assert normalised("another theatre") == "another theatre"
    assert exact_match("the Ada Berg!", ["Bo", "ada berg"]) == 1.0
    assert exact_match("Ada", ["Ada Berg"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("Ada Berg", ["ada berg"], 1.0),
        ("Mrs Ada Berg", ["Ada Berg"], 4 / 5),
        ("Berg Berg", ["Ada Berg"], 1 / 2),
        ("by Bo", ["Ada Berg", "Bo"], 2 / 3),
        ("", ["Ada Berg"], 0.0),
        ("the", ["a"], 1.0),
    ],
)
def test_f1_by_hand(answer, right, expected):
    assert token_f1(answer, right) == pytest.approx(expected)


def test_an_interval_holds_the_mean_and_is_the_same_again():
    values = torch.linspace(0.9, 1.1, 100, dtype=torch.float64) * (torch.arange(100) < 30)
    mean = lambda draws: values[draws].mean(1)  # noqa: E731
    low, high = interval(mean, 100, 0)
    # The normal approximation of a mean of 0.28, of which 0.43 is the deviation, in 100.
    assert low == pytest.approx(0.20, abs=0.03) and high == pytest.approx(0.37, abs=0.03)
    assert interval(mean, 100, 0) == (low, high) and interval(mean, 100, 1) != (low, high)


def test_items():
    rows = [ROW, {**ROW, "answers": ["Berg", "Ada"]}, Item("t", "q", ("a",))]
    assert items_of(rows) == [
        Item(ROW["text"], ROW["question"], ("Ada Berg",)),
        Item(ROW["text"], ROW["question"], ("Berg", "Ada")),
        rows[2],
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected at least one row"),
        (ROW, "items: expected a list of rows, got one dict"),
        ([ROW, "text"], r"items\[1\]: expected a row .*got str"),
        ([{**ROW, "text": " "}], r"items\[0\]: text: expected a string that is not empty, got ' '"),
        ([{**ROW, "question": 3}], r"items\[0\]: question: expected a string.*got 3"),
        ([{"text": "t", "question": "q"}], r"items\[0\]: answer: expected a string, or answers.*None"),
        ([{**ROW, "answers": []}], r"items\[0\]: answer: .* at least one, got \[\]"),
        ([{**ROW, "answers": "Ada"}], r"items\[0\]: answer: .*got 'Ada'"),
    ],
)
def test_wrong_items(rows, message):
    with pytest.raises(ValueError, match=message):
        items_of(rows)
