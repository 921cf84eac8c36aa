"""The codec that ships must really work: accuracy, ratio and allocation on text it was not trained on.

``tests/data/unseen.txt`` is from *The Little Colonel's Hero* (1902, public domain), a book of which no part is in the
training text; ``demo.txt`` was written for this project.
"""

import math
from pathlib import Path

import pytest
import torch

import ztok_fast
from ztok_fast import ZTokCodec
from ztok_fast.cli.measure import surprisal
from ztok_fast.codec.shipped import MODELS
from ztok_fast.codec.slots import written_tokens
from ztok_fast.codec.text import detokenize

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {
    "novel": ROOT / "tests" / "data" / "unseen.txt",
    "demo": ROOT / "ztok_fast" / "data" / "demo.txt",
}


@pytest.fixture(scope="module")
def codec() -> ZTokCodec:
    return ZTokCodec.from_pretrained("ztok-mini")


@pytest.fixture(scope="module")
def documents(codec) -> list[list[int]]:
    found = []
    for path in TEXTS.values():
        tokens = codec.tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        found += [tokens[i : i + 1024] for i in range(0, len(tokens), 1024)]
    return found


def share_right(codec, documents, z) -> float:
    written = codec.decompress_tokens(z)
    pairs = [(a, b) for own, back in zip(documents, written, strict=True) for a, b in zip(own, back, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def compressed(codec, documents, ratio, **options):
    return codec.compress([detokenize(codec.tokenizer, own) for own in documents], ratio, **options)


@pytest.mark.parametrize("ratio", [2, 4, 5])
def test_unseen_text_comes_back_exactly_without_corrections(codec, documents, ratio):
    z = compressed(codec, documents, ratio)
    assert share_right(codec, documents, z) == 1
    assert all(info.corrections is None for info in z.documents)
    # Naming every token would take log2 of the vocabulary.
    assert z.rate <= 0.85 * math.log2(z.codebook_size)


def test_at_ratio_eight_most_of_it_comes_back(codec, documents):
    z = compressed(codec, documents, 8)
    assert share_right(codec, documents, z) >= 0.7
    assert z.rate <= 0.6 * math.log2(z.codebook_size)
    fixed = compressed(codec, documents, 8, fixed_units=True)
    assert share_right(codec, documents, fixed) < share_right(codec, documents, z)


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_achieved_ratio_is_within_a_tenth_of_what_is_asked(codec, documents, ratio):
    z = compressed(codec, documents, ratio)
    for one in z:
        if one.tokens >= 150:
            assert abs(one.achieved_ratio / ratio - 1) <= 0.1


def test_what_is_written_is_what_the_model_finds_surprising(codec, documents):
    """Tokens that must be written cost the bare base model more bits than those that are guessed, by far."""
    z = compressed(codec, documents, 4)
    bits = torch.cat([surprisal(codec, own) for own in documents])
    named = written_tokens(z) >= 0
    assert bits[named].mean() > 3 * bits[~named].mean()
    assert 0.5 < named.float().mean() < 0.75


@pytest.mark.parametrize("text", TEXTS)
def test_exact_mode_returns_every_byte(codec, tmp_path, text):
    original = TEXTS[text].read_text(encoding="utf-8")
    codec.save(codec.compress([original], ratio=4, exact=True), tmp_path / "text.ztok")
    loaded = codec.load(tmp_path / "text.ztok")
    assert codec.decompress(loaded) == [original]
    tokens = loaded.documents[0].tokens
    assert len(loaded.documents[0].corrections.positions) == 0, "what is written is all it takes"
    assert tokens and loaded.rate_exact == loaded.rate


def test_the_same_input_gives_the_same_codes(codec):
    text = TEXTS["demo"].read_text(encoding="utf-8")
    first, again = codec.compress([text]), codec.compress([text])
    assert torch.equal(first.codes, again.codes)
    assert codec.decompress(first) == codec.decompress(again)


def test_shipped_files_are_small():
    assert sum(f.stat().st_size for f in (MODELS / "ztok-mini").rglob("*") if f.is_file()) <= 20_000_000
    assert sum(f.stat().st_size for f in MODELS.rglob("*") if f.is_file()) <= 40_000_000


@pytest.mark.parametrize("ratio", [6])
def test_codes_are_those_of_the_reference(codec, ratio):
    """Whatever backends run here by default, they give the codes, units and text that the reference gives."""
    documents = [path.read_text(encoding="utf-8")[:600] for path in TEXTS.values()]
    found = codec.compress(documents, ratio)
    with ztok_fast.backend("reference"):
        expected = codec.compress(documents, ratio)
        written = codec.decompress(expected)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.unit_lengths, expected.unit_lengths) and torch.equal(found.cu_ztokens, expected.cu_ztokens)
    assert codec.decompress(found) == written
