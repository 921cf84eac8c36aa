"""``ztok bench files``: sizes that are those of the files, and mistakes that are said."""

import bz2
import json
import lzma
import zlib

import pytest

from tests.cli.conftest import assert_mistake
from ztok_fast.cli import common, profile_files

PROSE = b"It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.txt").write_bytes(PROSE)
    rows = [{"text": "A short one.", "source": "s"}, {"text": "Another " * 9, "source": "s"}, {"text": "é" * 40}]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_sizes_are_those_of_the_files(ztok, files, tmp_path):
    outputs = ("--json", tmp_path / "o.json", "--markdown", tmp_path / "o.md")
    more = ("--context", 64, "--characters", 20, "--documents", 1)
    result = ztok("bench", "files", files / "a.txt", files / "b.jsonl", *outputs, *more)
    assert result.status == 0 and result.err == ""
    found = json.loads((tmp_path / "o.json").read_text())
    sizes = {(row["text"], row["compressor"]): row for row in found["results"]}
    texts = {"a.txt": PROSE, "s": b"A short one.", "b.jsonl": "é".encode() * 20}
    for name, text in texts.items():
        assert (sizes[name, "coded"]["size"], sizes[name, "coded"]["files"]) == (len(text), 1)
        assert sizes[name, "zlib -9"]["bytes"] == len(zlib.compress(text, 9))
        assert sizes[name, "bzip2 -9"]["bytes"] == len(bz2.compress(text, 9))
        assert sizes[name, "xz -9e"]["bytes"] == len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    text = files / "a.txt"
    packed = tmp_path / "a.ztok"
    assert ztok("compress", text, "--units", "coded", "--context", 64, "-o", packed).status == 0
    assert sizes["a.txt", "coded"]["bytes"] == packed.stat().st_size
    total = sum(row["bytes"] for row in found["results"] if row["compressor"] == "coded")
    assert f"{total:,}" in result.out and "all files" in result.out
    assert (tmp_path / "o.md").read_text().count("| ---:") >= 2
    assert found["missing"] == {
        own: label for own, label in profile_files.PACKAGES.items() if label not in profile_files.general_compressors()
    }


def test_every_compressor_gives_the_text_back():
    for label, (compress, decompress) in profile_files.general_compressors().items():
        assert decompress(compress(PROSE)) == PROSE and len(compress(PROSE)) < len(PROSE), label


def test_what_is_not_installed_is_said(ztok, files, monkeypatch):
    monkeypatch.setattr(profile_files.importlib.util, "find_spec", lambda name: None)
    result = ztok("bench", "files", files / "a.txt")
    assert result.status == 0
    for package in ("zstandard", "brotli", "pyppmd"):
        assert f"pip install {package}" in result.out


def test_plot_is_drawn(ztok, files, tmp_path):
    pytest.importorskip("matplotlib")
    assert ztok("bench", "files", files / "a.txt", "--plot", tmp_path / "o.png").status == 0
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_answer_is_no_measurement(ztok, files, monkeypatch):
    monkeypatch.setattr(profile_files, "general_compressors", lambda: {"bad": (lambda data: data, lambda data: b"")})
    assert_mistake(ztok("bench", "files", files / "a.txt"), "bad: expected the text back")


def test_mistakes(ztok, files, tmp_path, monkeypatch):
    text, empty = files / "a.txt", tmp_path / "empty.txt"
    empty.write_text("")
    assert_mistake(ztok("bench", "files", tmp_path / "none.txt"), "no such file")
    assert_mistake(ztok("bench", "files", empty), "at least one byte")
    assert_mistake(ztok("bench", "files", "-", "-"), "at most once")
    assert_mistake(ztok("bench", "files", text, "--documents", 0), "--documents", "at least 1")
    assert_mistake(ztok("bench", "files", text, "--context", 3), "context", "power of two")
    assert_mistake(ztok("bench", "files", text, "--json", text), "overwritten")
    assert_mistake(ztok("bench", "files", text, "--markdown", tmp_path / "x.txt"), "ends in .md")
    (tmp_path / "x.jsonl").write_text("{}")
    assert_mistake(ztok("bench", "files", tmp_path / "x.jsonl"), "x.jsonl, line 1", "'text'")
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    assert_mistake(ztok("bench", "files", text, "--plot", tmp_path / "x.png"), "ztok-fast[bench]")
