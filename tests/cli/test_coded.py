"""Coded units on the command line."""

import json
import re

import pytest

from ztok_fast.cli import common
from ztok_fast.cli.main import main
from ztok_fast.codec.coded import TextCoder
from ztok_fast.codec.coded_units import UnitCoder

PROSE = b"It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 3


def test_round_trip_of_one_file(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_bytes(PROSE)
    assert main(["compress", str(text), "--units", "coded", "--context", "64", "--window", "32"]) == 0
    said = capsys.readouterr().out
    packed = tmp_path / "a.txt.ztok"
    assert re.search(rf"{len(PROSE)} bytes -> {packed.stat().st_size}, \d\.\d+ bits per byte, \d+\.\d s", said)
    assert main(["decompress", str(packed), "-o", str(tmp_path / "b.txt")]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"b.txt: {len(PROSE)} bytes from {packed}, \d\.\d+ bits per byte, \d+\.\d s", said)
    assert (tmp_path / "b.txt").read_bytes() == PROSE
    assert main(["decompress", str(packed), "--engine", "float32"]) == 2
    assert f"{packed}: expected a file coded with" in capsys.readouterr().err


@pytest.mark.parametrize("aligned", [False, True])
def test_both_forms_are_described_and_shown(tmp_path, capsys, aligned):
    (tmp_path / "a.txt").write_bytes(PROSE)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    packed, form = str(tmp_path / "x.ztok"), ["--aligned"] if aligned else []
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert main(["compress", *names, "-o", packed, "--units", "coded", "--context", "64", *form]) == 0
    assert main(["decompress", packed, "-o", str(tmp_path / "out")]) == 0
    assert [p.read_bytes() for p in sorted((tmp_path / "out").iterdir())] == [PROSE, b"\xff\xfe"]
    coder = UnitCoder(TextCoder.from_pretrained(context=64))
    z = coder.compress([PROSE], aligned)
    capsys.readouterr()
    assert main(["info", packed, "--units"]) == 0
    facts, (prose, other) = parse(capsys.readouterr().out)
    assert facts["documents"] == "2" and facts["text tokens"] == str(z.tokens)
    assert facts["Z-tokens"] == f"{z.ztokens} of 4 codes from 2,048" and facts["form"].split(":")[0] == (
        "aligned" if aligned else "stream"
    )
    assert facts["rate"] == f"{z.rate:.2f} bits per text token" and "1 of them stored without" in facts["parts"]
    assert prose.count("|") == z.ztokens and "no text" in other
    page = tmp_path / "v.html"
    assert main(["view", packed, "-o", str(page)]) == 0
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    assert "".join(data["tokens"]).encode() == PROSE and data["ratios"][0]["lengths"] == z.unit_lengths.tolist()
    assert data["ratios"][0]["codes"] == z.codes.tolist() and len(data["bits"]) == z.tokens
    assert main(["view", packed, "-o", str(page), "--tokens", "20"]) == 0
    assert "the first 20 of" in capsys.readouterr().err
    for document, message in ((1, "expected text that tokens"), (2, "--document: expected 0 to 1, got 2")):
        assert main(["view", packed, "-o", str(page), "--document", str(document)]) == 2
        assert message in capsys.readouterr().err


def parse(said: str) -> tuple[dict[str, str], list[str]]:
    """The facts that `info` states, and what it shows of each document."""
    facts, *shown = said.split("\ndocument ")
    return {
        name.strip(): value.strip() for name, _, value in (line.partition("  ") for line in facts.splitlines())
    }, shown


def test_several_documents(tmp_path, capsys):
    names = []
    for index, data in enumerate([PROSE, b"", b"\xff not text"]):
        names.append(str(tmp_path / f"{index}.txt"))
        (tmp_path / f"{index}.txt").write_bytes(data)
    packed = str(tmp_path / "all.ztok")
    assert main(["compress", *names, "-o", packed, "--units", "coded", "--no-verify"]) == 0
    assert main(["decompress", packed, "-o", str(tmp_path / "out")]) == 0
    assert [p.read_bytes() for p in sorted((tmp_path / "out").iterdir())] == [PROSE, b"", b"\xff not text"]
    assert main(["decompress", packed, "--document", "2", "-o", str(tmp_path / "third")]) == 0
    assert (tmp_path / "third").read_bytes() == b"\xff not text"
    capsys.readouterr()
    assert main(["decompress", packed, "--document", "3"]) == 2
    assert "--document: expected 0 to 2, got 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exact"], "expected no --exact"),
        (["--ratio", "4"], "expected no --ratio"),
        (["--context", "48"], "context: expected a power of two"),
        (["--engine", "float"], "expected --engine int8 or float32"),
        (["--window", "3"], "window: expected a power of two"),
        (["--context", "0"], "context: expected an integer from 1"),
        (["--base", "nowhere-at-all"], "was not found"),
    ],
)
def test_mistakes_are_said(tmp_path, capsys, options, message):
    text = tmp_path / "a.txt"
    text.write_bytes(PROSE)
    assert main(["compress", str(text), "--units", "coded", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.txt.ztok").exists()


def test_damage_is_said(tmp_path, capsys):
    packed = tmp_path / "a.ztok"
    packed.write_bytes(b"ZC\x19 and then nothing that is right")
    assert main(["decompress", str(packed)]) == 2
    assert str(packed) in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--context", "64"], ["--window", "64"], ["--aligned"], ["--no-verify"]])
def test_options_of_coded_units_are_refused_without_them(tmp_path, capsys, option):
    (tmp_path / "a.txt").write_bytes(PROSE)
    assert main(["compress", str(tmp_path / "a.txt"), *option]) == 2
    assert f"{option[0]}: expected " in capsys.readouterr().err


def test_progress_names_rate_and_time_left(tmp_path, capsys, monkeypatch):
    """On a terminal, both ways: the part that is done, the time left and bytes a second."""
    monkeypatch.setattr(common, "shows_progress", lambda: True)
    monkeypatch.setattr(common, "BAR_DELAY_SECONDS", 0)
    (tmp_path / "a.txt").write_bytes(PROSE)
    packed = str(tmp_path / "a.txt.ztok")
    assert main(["compress", str(tmp_path / "a.txt"), "--units", "coded", "--context", "64"]) == 0
    assert re.search(rf"compress: +\d+%.*/{len(PROSE)} \[\d\d:\d\d<.*B/s\]", capsys.readouterr().err)
    assert main(["decompress", packed, "-o", str(tmp_path / "b.txt")]) == 0
    assert re.search(rf"decompress: +\d+%.*/{len(PROSE)} \[\d\d:\d\d<.*B/s\]", capsys.readouterr().err)
