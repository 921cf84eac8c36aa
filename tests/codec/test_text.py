"""Long texts in pieces: the tokens and the text are those of the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.codec.tiny_base import tiny_tokenizer
from ztok_fast.codec import text
from ztok_fast.codec.shipped import MODELS
from ztok_fast.codec.text import detokenize, tokenize


def metaspace_tokenizer():
    """Marks the start of every text, so no text after a cut has the tokens of the whole."""
    pieces = [("<unk>", 0.0), ("▁", -2.0)] + [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz"] + [("▁the", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def shipped_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODELS / "mini-base" / "base")


@pytest.fixture(params=[tiny_tokenizer, shipped_tokenizer, metaspace_tokenizer], ids=["tiny", "shipped", "metaspace"])
def tokenizer(request):
    return request.param()


@pytest.fixture
def small(monkeypatch):
    """Cuts in short texts."""
    for name, value in (("CUT_CHARS", 64), ("CONTEXT_CHARS", 32), ("CUT_TOKENS", 32), ("CONTEXT_TOKENS", 16)):
        monkeypatch.setattr(text, name, value)


def whole(tokenizer, content):
    return tokenizer(content, add_special_tokens=False)["input_ids"]


TEXTS = {
    "prose": "The small text learns merges, as small texts go; it's 1984.\r\n\n  And   so\ton. " * 12,
    "one-letter": "b" + "a" * 700,
    "no-space": "abc,def.gh;" * 60,
    "spaces": " \n \t  " * 90 + "x" + " " * 300,
    "wide": "東京🙂é" * 120 + " ".join("naïve café ☃" for _ in range(30)),
    "marks": "<|endoftext|>text<|endoftext|>" * 20,
    "short": "a",
    "empty": "",
}


@pytest.mark.parametrize("name", TEXTS)
def test_tokens_are_those_of_the_whole_text(tokenizer, small, name):
    (own,) = tokenize(tokenizer, [TEXTS[name]])
    expected = whole(tokenizer, TEXTS[name])
    assert own.tolist() == expected
    assert detokenize(tokenizer, own).decode() == tokenizer.decode(expected, clean_up_tokenization_spaces=False)


@given(st.text(st.sampled_from("ab  \n.,'sé東🙂1"), max_size=400))
@settings(max_examples=60, deadline=None)
def test_any_text(content):
    tokenizer = tiny_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("CUT_CHARS", 40), ("CONTEXT_CHARS", 24), ("CUT_TOKENS", 24), ("CONTEXT_TOKENS", 8)):
            patch.setattr(text, name, value)
        (own,) = tokenize(tokenizer, [content])
        assert own.tolist() == whole(tokenizer, content)
        assert detokenize(tokenizer, own).decode("utf-8", "surrogatepass") == tokenizer.decode(own.tolist())


@pytest.mark.parametrize("seed", range(3))
def test_any_tokens_decode_as_all_at_once(small, seed):
    """Tokens that no text has, with characters broken in the middle."""
    tokenizer = tiny_tokenizer()
    tokens = torch.randint(3, len(tokenizer), (500,), generator=torch.Generator().manual_seed(seed)).tolist()
    expected = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert detokenize(tokenizer, tokens).decode("utf-8", "surrogatepass") == expected


def test_no_call_gets_more_than_a_piece(small, monkeypatch):
    tokenizer, sizes = tiny_tokenizer(), []

    class Spy:
        is_fast = True

        def __call__(self, content, **options):
            sizes.append(len(content) if isinstance(content, str) else sum(map(len, content)))
            return tokenizer(content, **options)

    (own,) = tokenize(Spy(), [TEXTS["prose"]])
    assert own.tolist() == whole(tokenizer, TEXTS["prose"])
    assert max(sizes) <= 64 + 32


def test_texts_keep_their_order(small):
    tokenizer = tiny_tokenizer()
    texts = [TEXTS["short"], TEXTS["prose"], TEXTS["empty"], *["ab c"] * 200, TEXTS["one-letter"], "end"]
    assert [own.tolist() for own in tokenize(tokenizer, texts)] == [whole(tokenizer, t) for t in texts]
    assert tokenize(tokenizer, []) == []
