"""A warning where bytes are lost before compression, and none where every byte is in the tokens."""

import warnings

import pytest

from ztok_fast.codec.errors import LossyTextWarning

KEPT = ["plain words", "", "東京 🙂 café\r\n", b"bytes that are text", "\ufeffmark first", "nul \0 inside", "\ufffd"]


def test_nothing_is_said_where_no_byte_is_lost(codec):
    with warnings.catch_warnings():
        warnings.simplefilter("error", LossyTextWarning)
        codec.compress(KEPT, ratio=2)
        codec.compress([b"caf\xe9", "\ud800"], ratio=2, exact=True)


@pytest.mark.parametrize(
    ("texts", "documents", "first"),
    [
        ([b"caf\xe9 and more"], [0], 3),
        (["fine", b"\x89PNG\r\n\x1a\n\x00\xff", b"fine too"], [1], 0),
        (["fine", "half \ud83d of a pair", b"\xff"], [1, 2], 5),
    ],
    ids=["latin-1", "binary", "lone surrogate"],
)
def test_lost_bytes_are_said_once(codec, texts, documents, first):
    with pytest.warns(LossyTextWarning, match="exact=True keeps every byte") as caught:
        codec.compress(texts, ratio=2)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert caught[0].message.documents == documents and caught[0].message.first_byte == first


def test_a_tokenizer_that_changes_a_text_loses_bytes_too(codec, monkeypatch):
    monkeypatch.setattr(codec, "_text_bytes", lambda tokens: b"lower case")
    with pytest.warns(LossyTextWarning) as caught:
        codec.compress(["lower Case"], ratio=2)
    assert caught[0].message.first_byte == 6
