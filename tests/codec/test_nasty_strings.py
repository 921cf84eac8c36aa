"""Exact mode returns every byte of texts that break tokenizers, Unicode handling, allocation of units, or files."""

import unicodedata

import pytest

from tests.codec.nasty_strings import LONG, nasty_bytes, nasty_texts
from ztok_fast import ZTokCodec


def encoded(original):
    """The bytes that have to come back; lone surrogates as the three bytes that UTF-8 would give them."""
    return original if isinstance(original, bytes) else original.encode("utf-8", "surrogatepass")


def check(codec, path, long):
    """Compress, save, load, decompress, compare."""
    originals = {**nasty_texts(long), **nasty_bytes()}
    codec.save(codec.compress(list(originals.values()), ratio=4, exact=True), path)
    found = codec.decompress_bytes(codec.load(path))
    assert [name for name, data in zip(originals, found, strict=True) if data != encoded(originals[name])] == []


def test_every_byte_comes_back_from_a_codec_that_gets_nothing_right(codec, tmp_path):
    check(codec, tmp_path / "nasty.ztok", 400)


@pytest.mark.slow
def test_every_byte_comes_back_from_the_codec_that_ships(tmp_path):
    check(ZTokCodec.from_pretrained("ztok-mini"), tmp_path / "nasty.ztok", LONG)


def test_the_nasty_strings_hold_what_breaks_things():
    texts, raw = nasty_texts(5000), nasty_bytes()
    joined = "".join(texts.values())
    assert "" in texts.values() and b"" in raw.values()
    assert len(texts["one character, many times"]) == 5000
    for wanted in ("\0", "\r\n", "\t", "\ufeff", "\u200d", "\ud83d", "\udc00", "<|endoftext|>", "\U0010ffff"):
        assert wanted in joined
    assert any(unicodedata.normalize("NFC", text) != text for text in texts.values())
    assert len({encoded(text) for text in texts.values()}) == len(texts)
    undecodable = [data for data in raw.values() if data.decode("utf-8", "ignore").encode() != data]
    assert len(undecodable) >= 8
