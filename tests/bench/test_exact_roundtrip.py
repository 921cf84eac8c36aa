import json
import unicodedata

import pytest

from bench import exact_roundtrip
from bench.exact_roundtrip import check_family, encoded, main, read_family
from bench.nasty_strings import nasty_bytes, nasty_texts
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.train.text_data import DataError


def test_every_byte_of_every_family_returns(codec_folder, texts, tmp_path, capsys):
    results = tmp_path / "results" / "exact.json"
    arguments = ["--codec", str(codec_folder), "--files", str(texts), "--limit", "3", "--characters", "90"]
    assert main([*arguments, "--long", "400", "--json", str(results)]) == 0
    stored = json.loads(results.read_text())
    families = {family["family"]: family for family in stored["families"]}
    assert list(families) == ["nasty strings", "nasty bytes", "texts"]
    assert all(not family["failures"] for family in families.values())
    assert families["texts"]["texts"] == 3 and families["texts"]["bytes"] == 3 * 90
    assert families["nasty strings"]["texts"] == len(nasty_texts(400))
    # A random codec gets next to nothing right, so the corrections must cost something.
    assert families["texts"]["rate_exact"] > families["texts"]["rate"] > 0
    assert "bench.exact_roundtrip --codec" in stored["environment"]["command"]
    assert capsys.readouterr().out.count(" yes ") == 3


def test_a_document_that_comes_back_changed_fails_the_run(codec_folder, monkeypatch, capsys):
    right = ZTokCodec.decompress_bytes

    def wrong(self, z, **settings):
        return [data.replace(b"\r\n", b"\n") for data in right(self, z, **settings)]

    monkeypatch.setattr(ZTokCodec, "decompress_bytes", wrong)
    few = {name: nasty_texts(1)[name] for name in ("CRLF", "lone high surrogate")}
    monkeypatch.setattr(exact_roundtrip, "nasty_texts", lambda long: few)
    assert main(["--codec", str(codec_folder)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED nasty strings, CRLF: differs from byte 5 on" in printed
    assert "| NO" in printed and "lone high surrogate:" not in printed


def test_a_document_that_cannot_be_restored_is_named_and_the_others_are_not(codec):
    documents = {"good": "The kettle boils.", "bad": "The ferry leaves."}
    original = exact_roundtrip.ZBatch.load

    class Damaged(exact_roundtrip.ZBatch):
        @classmethod
        def load(cls, path):
            z = original(path)
            z.documents[1].sha256 = "0" * 64
            return z

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_roundtrip, "ZBatch", Damaged)
        result = check_family(codec, "family", documents, 2.0)
    assert list(result["failures"]) == ["bad"]
    assert "ExactMismatchError" in result["failures"]["bad"]


def test_a_family_without_text_is_refused(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="expected at least one text"):
        read_family(empty, 5, 100)


@pytest.mark.parametrize(
    "arguments", [["--files", "nowhere.jsonl"], ["--codec", "nowhere"], ["--ratio", "99"]], ids=lambda a: a[0][2:]
)
def test_mistakes_are_told_in_one_line(codec_folder, arguments, capsys):
    assert main(["--codec", str(codec_folder), *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_nasty_strings_hold_what_breaks_things():
    texts, raw = nasty_texts(5000), nasty_bytes()
    joined = "".join(texts.values())
    assert "" in texts.values() and b"" in raw.values()
    assert (
        len(texts["one character, many times"]) == 5000 and len(nasty_texts()["one character, many times"]) == 1_000_000
    )
    for wanted in ("\0", "\r\n", "\t", "\ufeff", "\u200d", "\ud83d", "\udc00", "<|endoftext|>", "\U0010ffff"):
        assert wanted in joined
    assert any(unicodedata.normalize("NFC", text) != text for text in texts.values())
    undecodable = 0
    for data in raw.values():
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            undecodable += 1
    assert undecodable >= 8
    assert len({encoded(text) for text in texts.values()}) == len(texts)
