"""``ztok info`` on files, texts and codecs, and ``ztok doctor``."""

import json

import pytest

from tests.cli.conftest import TEXT, assert_mistake, load
from ztok_fast.cli import report
from ztok_fast.codec.codec import ZTokCodec


def stated(result) -> dict[str, str]:
    """The aligned lines of a name and a value."""
    lines = result.out.split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition("  ") for line in lines)}


def test_a_file_is_described(tiny, compressed, codec_folder):
    z = load(codec_folder, compressed)
    result = tiny("info", compressed)
    values = stated(result)
    assert result.status == 0
    assert values["documents"] == "1" and values["text tokens"] == str(z.tokens)
    assert values["Z-tokens"].startswith(f"{z.ztokens} of")
    assert values["achieved ratio"].startswith(f"{z.achieved_ratio:.2f}")
    assert values["rate"].startswith(f"{z.rate:.2f}") and values["exact"].startswith(f"{z.rate_exact:.2f}")
    assert values["original"] == f"{len(TEXT.encode())} bytes" and values["codec"] == z.codec_fingerprint
    assert values["this file"] == f"{compressed.stat().st_size:,} bytes"
    row = result.out.splitlines()[-1]
    kind = "stored as it is" if z.documents[0].corrections.raw is not None else "bytes"
    assert kind in row


def test_units_of_a_file_are_shown_on_its_text(tiny, tmp_path, codec_folder):
    (tmp_path / "a.txt").write_text(TEXT)
    tiny("compress", tmp_path / "a.txt", "-o", tmp_path / "a.ztok")
    z = load(codec_folder, tmp_path / "a.ztok")
    result = tiny("info", tmp_path / "a.ztok", "--units", "--tokens", 0)
    codec = ZTokCodec.from_pretrained(codec_folder)
    texts = report.token_texts(codec.tokenizer, codec.decompress_tokens(z)[0])
    shown = result.out.split("document 0:\n")[1]
    assert shown == report.fold(report.mark_units(texts, z.unit_lengths.tolist(), False), False) + "\n"


def test_document_stored_as_it_is_has_no_units_to_show(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 3000)
    tiny("compress", tmp_path / "a.txt", "--exact")
    result = tiny("info", tmp_path / "a.txt.ztok", "--units")
    assert result.out.rstrip().endswith("stored as it is, since that is smaller than what exact mode adds")


def test_text_is_marked_by_unit(tiny, tmp_path):
    text = "The cat sat on the mat, and the dog saw it."
    (tmp_path / "a.txt").write_text(text)
    result = tiny("info", tmp_path / "a.txt", "--ratio", 2)
    values, shown = stated(result), result.out.split("\n\n")[1]
    assert shown.count("|") == int(values["Z-tokens"])
    assert shown.replace("|", "").strip() == text
    assert "\033" not in result.out


def test_text_is_coloured_on_a_terminal(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "use_colour", lambda: True)
    (tmp_path / "a.txt").write_text("The cat sat on the mat.")
    result = tiny("info", tmp_path / "a.txt")
    shown = result.out.split("\n\n")[1]
    assert shown.count(report._RESET) == int(stated(result)["Z-tokens"]) and "|" not in shown


def test_long_text_is_cut_where_a_unit_ends(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("The cat sat on the mat. " * 40)
    result = tiny("info", tmp_path / "a.txt", "--tokens", 50)
    left = int(stated(result)["text tokens"]) - 50
    hidden = int(result.out.split("... and ")[1].split()[0])
    assert left <= hidden < left + 8  # at most one unit less
    assert "more tokens" not in tiny("info", tmp_path / "a.txt", "--tokens", 0).out


def test_codec_is_described(ztok, codec_folder):
    result = ztok("info", codec_folder)
    values, codec = stated(result), ZTokCodec.from_pretrained(codec_folder)
    assert result.status == 0
    assert values["codec fingerprint"] == codec.fingerprint and values["base fingerprint"] == codec.base.fingerprint
    assert values["bits per Z-token"] == "13.00" and values["max_unit_length"] == "8"
    assert values["budgets"] == "[2.0, 4.0]"


def test_mistakes(ztok, tiny, tmp_path, compressed, other_codec_folder):
    assert_mistake(ztok("info", "no-such-thing"), "no-such-thing", "no such file, codec folder or shipped codec")
    assert_mistake(ztok("info", tmp_path), str(tmp_path), "codec folder")
    assert_mistake(ztok("info", tmp_path / "none.ztok"), "no such file")
    assert_mistake(tiny("info", compressed, "--tokens", "-1"), "--tokens")
    (tmp_path / "a.txt").write_text(TEXT)
    assert_mistake(tiny("info", tmp_path / "a.txt", "--ratio", 100), "ratio", "got 100")


@pytest.mark.parametrize("name", ["config.json", "codec.safetensors"])
def test_damaged_codec(ztok, codec_folder, tmp_path, name):
    for other in ("config.json", "codec.safetensors"):
        (tmp_path / other).write_bytes((codec_folder / other).read_bytes())
    (tmp_path / name).write_bytes((codec_folder / name).read_bytes()[:40])
    assert_mistake(ztok("info", tmp_path), name)


def test_doctor_reports_every_op(ztok):
    from ztok_fast.ops.op import OPS

    result = ztok("doctor", "--json")
    assert result.status == 0
    assert {entry["op"] for entry in json.loads(result.out)["ops"]} == set(OPS)
    assert "codebook_assign" in ztok("doctor").out
