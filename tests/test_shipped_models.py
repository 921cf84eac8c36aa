"""The codec that ships must really work: accuracy, ratio and allocation on text it was not trained on.

``tests/data/unseen.txt`` is from *The Little Colonel's Hero* (1902, public domain), a book of which no part is in the
training text; ``demo.txt`` was written for this project.
"""

from pathlib import Path

import pytest
import torch

import ztok_fast
from ztok_fast import ZTokCodec
from ztok_fast.codec.shipped import MODELS
from ztok_fast.train.evaluate import evaluate

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {
    "novel": ROOT / "tests" / "data" / "unseen.txt",
    "demo": ROOT / "ztok_fast" / "data" / "demo.txt",
}


@pytest.fixture(scope="module")
def codec() -> ZTokCodec:
    return ZTokCodec.from_pretrained("ztok-mini")


@pytest.fixture(scope="module")
def report(codec) -> dict:
    documents = []
    for path in TEXTS.values():
        tokens = codec.tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        documents += [tokens[i : i + 1024] for i in range(0, len(tokens), 1024)]
    return evaluate(codec, documents, [2, 4])


@pytest.mark.parametrize(("budget", "accuracy"), [("2", 0.95), ("4", 0.75)])
def test_free_running_accuracy_on_unseen_text(report, budget, accuracy):
    assert report[budget]["free_running"] >= accuracy


@pytest.mark.parametrize("budget", ["2", "4"])
def test_achieved_ratio_is_within_a_tenth_of_the_budget(report, budget):
    assert abs(report[budget]["ratio"] / float(budget) - 1) <= 0.1


def test_rate_at_ratio_two_is_above_the_texts_own_bits(report):
    assert report["2"]["rate"] > report["base"]["bits_per_token"]


@pytest.mark.parametrize("budget", ["2", "4"])
def test_dense_text_gets_shorter_units(report, budget):
    assert report[budget]["length_surprisal_correlation"] < -0.05


def test_ztokens_are_what_makes_it_right(report):
    """Without Z-tokens the same base model guesses far fewer tokens, even given the true prefix."""
    assert report["base"]["accuracy"] < 0.5 < report["4"]["free_running"]


@pytest.mark.parametrize("text", TEXTS)
def test_exact_mode_returns_every_byte(codec, tmp_path, text):
    from ztok_fast import ZBatch

    original = TEXTS[text].read_text(encoding="utf-8")
    codec.compress([original], ratio=4, exact=True).save(tmp_path / "text.ztok")
    loaded = ZBatch.load(tmp_path / "text.ztok")
    assert codec.decompress(loaded) == [original]
    tokens = loaded.documents[0].tokens
    # The corrections must be few: the codec carries the text, not they.
    assert len(loaded.documents[0].corrections.positions) < 0.35 * tokens


def test_the_same_input_gives_the_same_codes(codec):
    text = TEXTS["demo"].read_text(encoding="utf-8")
    first, again = codec.compress([text]), codec.compress([text])
    assert torch.equal(first.codes, again.codes)
    assert codec.decompress(first) == codec.decompress(again)


def test_shipped_files_are_small():
    assert sum(f.stat().st_size for f in (MODELS / "ztok-mini").rglob("*") if f.is_file()) <= 20_000_000
    assert sum(f.stat().st_size for f in MODELS.rglob("*") if f.is_file()) <= 40_000_000


@pytest.mark.parametrize("ratio", [2, 4])
def test_codes_are_those_of_the_reference(codec, ratio):
    """Whatever backends run here by default, they give the codes, units and text that the reference gives."""
    documents = [path.read_text(encoding="utf-8")[:4000] for path in TEXTS.values()]
    found = codec.compress(documents, ratio)
    with ztok_fast.backend("reference"):
        expected = codec.compress(documents, ratio)
        written = codec.decompress(expected)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.unit_lengths, expected.unit_lengths) and torch.equal(found.cu_ztokens, expected.cu_ztokens)
    assert codec.decompress(found) == written
