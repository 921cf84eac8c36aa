"""``ztok compress`` and ``ztok decompress``: round trips, and every way that a user can go wrong."""

import io
import os
import sys
from pathlib import Path

import pytest
import tqdm

from tests.cli.conftest import TEXT, assert_mistake, load
from ztok_fast.cli import common


@pytest.fixture
def stdin(monkeypatch):
    def set_to(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return set_to


def test_exact_file_comes_back_on_stdout_and_as_a_file(tiny, compressed, tmp_path):
    assert tiny("decompress", compressed).bytes == TEXT.encode()
    assert tiny("decompress", compressed, "-o", tmp_path / "new" / "out.txt").status == 0
    assert (tmp_path / "new" / "out.txt").read_bytes() == TEXT.encode()
    assert os.listdir(tmp_path / "new") == ["out.txt"]


def test_bytes_that_are_not_utf8_come_back_in_exact_mode_only(tiny, tmp_path):
    data = b"caf\xe9 \xff\xfe\x00 end \xc3"
    (tmp_path / "latin.txt").write_bytes(data)
    exact = tiny("compress", tmp_path / "latin.txt", "-o", tmp_path / "exact.ztok", "--exact")
    assert exact.status == 0 and exact.err == ""
    assert tiny("decompress", tmp_path / "exact.ztok").bytes == data


def test_lost_bytes_are_said_in_one_line(tiny, tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    names = [tmp_path / name for name in ("text.txt", "latin.txt", "image.png")]
    one = tiny("compress", names[1])
    assert one.status == 0
    assert one.err == (
        f"ztok: warning: {names[1]}: bytes that are not text, from byte 3 on, are lost; --exact keeps every byte\n"
    )
    several = tiny("compress", *names, "-o", tmp_path / "lossy.ztok")
    assert several.status == 0 and several.err.count("\n") == 1
    assert "latin.txt and 1 more: " in several.err and "--exact" in several.err
    assert tiny("compress", names[0]).err == ""
    assert tiny("info", names[1]).err == ""  # nothing is kept of what it compresses


def test_summary_states_what_the_file_holds(tiny, tmp_path, codec_folder):
    (tmp_path / "a.txt").write_text(TEXT)
    result = tiny("compress", tmp_path / "a.txt", "--ratio", "2", "--levels", "1")
    z = load(codec_folder, tmp_path / "a.txt.ztok")
    assert z.documents[0].budget == 2 and z.documents[0].levels == 1
    assert f"{z.tokens} tokens -> {z.ztokens} Z-tokens, ratio {z.achieved_ratio:.2f}, {z.rate:.2f} bits" in result.out


def test_fixed_units_have_the_length_asked_for(tiny, tmp_path, codec_folder):
    (tmp_path / "a.txt").write_text(TEXT)
    tiny("compress", tmp_path / "a.txt", "-r", "4", "--fixed-units")
    lengths = load(codec_folder, tmp_path / "a.txt.ztok").unit_lengths.tolist()
    assert set(lengths[:-1]) == {4}


def test_several_files_and_stdin_are_documents(tiny, tmp_path, stdin):
    (tmp_path / "a.txt").write_bytes(b"first")
    stdin("zweites \u2014 Blatt".encode())
    assert tiny("compress", tmp_path / "a.txt", "-", "--exact", "-o", tmp_path / "both.ztok").status == 0
    assert tiny("decompress", tmp_path / "both.ztok").out == "firstzweites \u2014 Blatt"
    assert tiny("decompress", tmp_path / "both.ztok", "--document", "1").out == "zweites \u2014 Blatt"
    assert tiny("decompress", tmp_path / "both.ztok", "-o", tmp_path / "folder").status == 0
    assert (tmp_path / "folder" / "0000.txt").read_bytes() == b"first"
    assert (tmp_path / "folder" / "0001.txt").read_bytes() == "zweites \u2014 Blatt".encode()
    assert_mistake(tiny("decompress", tmp_path / "both.ztok", "-o", tmp_path / "folder"), "empty folder")
    assert_mistake(tiny("decompress", tmp_path / "both.ztok", "--document", "2"), "--document", "0 to 1", "got 2")


def test_empty_stdin_is_an_empty_document(tiny, tmp_path, stdin):
    stdin(b"")
    result = tiny("compress", "-", "-o", tmp_path / "empty.ztok")
    assert result.status == 0 and "0 tokens -> 0 Z-tokens, ratio -" in result.out
    result = tiny("decompress", tmp_path / "empty.ztok")
    assert result.status == 0 and result.bytes == b""


@pytest.mark.parametrize("exact", [False, True], ids=["lossy", "exact"])
def test_progress_bar_counts_every_byte_on_a_terminal(tiny, tmp_path, monkeypatch, exact):
    bars = []

    class Watched(tqdm.tqdm):
        def close(self):
            bars.append((self.total, self.n))
            super().close()

    monkeypatch.setattr(tqdm, "tqdm", Watched)
    monkeypatch.setattr(common, "shows_progress", lambda: True)
    monkeypatch.setattr(common, "BAR_DELAY_SECONDS", 0.0)
    (tmp_path / "a.txt").write_text(TEXT)
    result = tiny("compress", tmp_path / "a.txt", *(["--exact"] if exact else []))
    assert result.status == 0 and "compress" in result.err and "B/s" in result.err
    assert bars[0] == (len(TEXT.encode()), len(TEXT.encode()))


def test_a_run_that_stopped_is_gone_on_from(tiny, tmp_path, monkeypatch):
    """And one document of what it then wrote is read alone."""
    for module in ("learned_file", "learned_writer"):
        monkeypatch.setattr(f"ztok_fast.codec.{module}.BLOCK_BYTES", 60)
    names = [tmp_path / f"{index}.txt" for index in range(4)]
    for index, name in enumerate(names):
        name.write_text(f"Text {index}. {TEXT}")
    assert tiny("compress", *names, "--exact", "-o", tmp_path / "whole.ztok").status == 0
    target = tmp_path / "x.ztok"
    kept = names[3].read_bytes()
    names[3].unlink()
    names[3].mkdir()
    monkeypatch.setattr(common, "check_input", lambda path: Path(path))
    assert_mistake(tiny("compress", *names, "--exact", "-o", target), "3.txt")
    assert os.path.exists(f"{target}.partial") and not target.exists()
    names[3].rmdir()
    names[3].write_bytes(kept)
    result = tiny("compress", *names, "--exact", "-o", target)
    size = sum(len(name.read_bytes()) for name in names)
    assert f"{size} bytes ({len(kept)} of them were there) -> {target.stat().st_size}" in result.out
    assert target.read_bytes() == (tmp_path / "whole.ztok").read_bytes()
    assert tiny("decompress", target, "--document", 2).bytes == names[2].read_bytes()
    assert "documents       4" in tiny("info", target).out


def test_no_bar_without_a_terminal(tiny, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    assert tiny("compress", tmp_path / "a.txt").err == ""


# Mistakes


def test_input_that_cannot_be_read(ztok, tmp_path):
    assert_mistake(ztok("compress", tmp_path / "none.txt"), "none.txt", "no such file")
    assert_mistake(ztok("compress", tmp_path, "-o", tmp_path / "a.ztok"), str(tmp_path), "got a folder")
    assert_mistake(ztok("decompress", tmp_path / "none.ztok"), "none.ztok", "no such file")
    assert_mistake(ztok("decompress", tmp_path), "got a folder")


def test_output_that_cannot_be_written(ztok, tmp_path, compressed):
    (tmp_path / "a.txt").write_text(TEXT)
    below = tmp_path / "a.txt" / "b.ztok"
    assert_mistake(ztok("compress", tmp_path / "a.txt", "-o", below), "b.ztok", "cannot be written")
    assert_mistake(ztok("compress", tmp_path / "a.txt", "-o", tmp_path / "a.zip"), "ends in .ztok")
    assert_mistake(ztok("compress", tmp_path / "a.txt", tmp_path / "a.txt"), "-o", "several files")
    assert_mistake(ztok("compress", "-"), "-o", "stdin")
    assert_mistake(ztok("compress", "-", "-", "-o", tmp_path / "a.ztok"), "stdin (-) at most once")
    assert_mistake(ztok("decompress", compressed, "-o", tmp_path), "got a folder")
    assert_mistake(ztok("decompress", compressed, "-o", below), "cannot be written")
    assert_mistake(ztok("compress", tmp_path / "a.txt", "-o", "-"), "output -", "standard output")
    assert_mistake(ztok("decompress", "-"), "-: ", "standard input")


def test_output_that_is_an_input_is_refused(ztok, tmp_path, compressed):
    own = tmp_path / "own.ztok"
    own.write_bytes(compressed.read_bytes())
    (tmp_path / "link.ztok").symlink_to(own)
    for command in ("compress", "decompress", "generate"):
        for output in (own, tmp_path / "link.ztok"):
            assert_mistake(ztok(command, own, "-o", output), "another file than the input", "overwritten")
    (tmp_path / "rows.jsonl").write_text("{}")
    assert_mistake(ztok("eval", tmp_path / "rows.jsonl", "--json", tmp_path / "rows.jsonl"), "another file")
    assert own.read_bytes() == compressed.read_bytes()


def test_folder_and_file_without_permission(ztok, tmp_path, compressed, monkeypatch):
    (tmp_path / "kept.txt").write_text("kept")
    monkeypatch.setattr("os.access", lambda *args, **kwargs: False)
    assert_mistake(ztok("decompress", compressed, "-o", tmp_path / "kept.txt"), "kept.txt", "may not be written")
    result = ztok("decompress", compressed, "-o", tmp_path / "new.txt")
    assert_mistake(result, "new.txt: cannot be written, no permission", str(tmp_path))
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_a_device_is_written_to(tiny, compressed):
    assert tiny("decompress", compressed, "-o", os.devnull).status == 0
    assert not os.path.isfile(os.devnull)


def test_output_that_stops_being_writable_is_an_error_too(tiny, tmp_path, compressed, monkeypatch):
    opened = Path.open

    def full(self, mode="r", *options, **more):
        if mode[0] in "wa":
            raise OSError(28, "No space left on device", str(self))
        return opened(self, mode, *options, **more)

    monkeypatch.setattr("pathlib.Path.open", full)
    for command, name in (("decompress", "out.txt"), ("generate", "out.ztok")):
        result = tiny(command, compressed, "-o", tmp_path / name)
        assert_mistake(result, f"ztok: error: {tmp_path / name}: No space left on device\n")
    assert os.listdir(tmp_path) == []


def test_truncated_and_foreign_files(tiny, tmp_path, compressed):
    data = compressed.read_bytes()
    (tmp_path / "cut.ztok").write_bytes(data[: len(data) // 2])
    (tmp_path / "foreign.ztok").write_bytes(b"PK\x03\x04 this is a zip, or so it says")
    (tmp_path / "empty.ztok").write_bytes(b"")
    flipped = bytearray(data)
    flipped[-1] ^= 1
    (tmp_path / "flipped.ztok").write_bytes(flipped)
    for name, words in (
        ("cut.ztok", "damaged"),
        ("foreign.ztok", "expected a whole file"),
        ("empty.ztok", "expected a whole file"),
        ("flipped.ztok", "damaged"),
    ):
        assert_mistake(tiny("decompress", tmp_path / name), name, words)


def test_codec_that_did_not_make_the_file(ztok, compressed, other_codec_folder, tmp_path):
    result = ztok("decompress", compressed, "-o", tmp_path / "out.txt", "--codec", other_codec_folder)
    assert_mistake(result, "fingerprint", "another one")
    assert os.listdir(tmp_path) == []


def test_codec_and_base_that_do_not_exist(ztok, compressed, codec_folder, tmp_path):
    assert_mistake(ztok("decompress", compressed, "--codec", "no-such-codec"), "no-such-codec", "codec folder")
    assert_mistake(
        ztok("decompress", compressed, "--codec", codec_folder, "--base", tmp_path), "was not found", "config.json"
    )


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ("0.5", "between 1 and 8"),
        ("0", "between 1 and 8"),
        ("1e9", "between 1 and 8"),
        ("9", "between 1 and 8"),
        ("-3", "between 1 and 8"),
        ("nan", "expected a number"),
    ],
)
def test_impossible_ratio(tiny, tmp_path, ratio, words):
    (tmp_path / "a.txt").write_text(TEXT)
    assert_mistake(tiny("compress", tmp_path / "a.txt", f"--ratio={ratio}"), "ratio", words)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_impossible_levels(tiny, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    assert_mistake(tiny("compress", tmp_path / "a.txt", "--levels", "3"), "levels", "1 to 2", "got 3")


def test_cuda_where_there_is_none(tiny, compressed, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_mistake(tiny("decompress", compressed, "--device", "cuda"), "--device cuda", "ztok doctor")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--keep", "3-9"), ("--keep", "START:END", "'3-9'")),
        (("--keep", "3:9"), ("keep, question", "name no tokens")),
        (("--question", "why?", "--units", "coded"), ("--question", "learned units")),
        (("--keep", "0:1", "--units", "coded"), ("--keep", "learned units")),
    ],
)
def test_wishes_that_cannot_be_met(tiny, tmp_path, options, words):
    (tmp_path / "a.txt").write_text(TEXT)
    assert_mistake(tiny("compress", tmp_path / "a.txt", *options), *words)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_spans_of_a_file_are_kept(ztok, tmp_path):
    """With the codec that ships, at a ratio that leaves much out."""
    text = "The committee met on 14 March 1987 in room 2217 and agreed to pay 4,300 francs to the widow. " * 3
    (tmp_path / "a.txt").write_text(text)
    start = text.index("2217")
    result = ztok(
        "compress", tmp_path / "a.txt", "--ratio", "16", "--keep", f"{start}:{start + 4}", "--question", "room?"
    )
    assert result.status == 0, result.err
    back = ztok("decompress", tmp_path / "a.txt.ztok", "-o", tmp_path / "b.txt")
    assert back.status == 0 and "2217" in (tmp_path / "b.txt").read_text()


def test_slots_that_need_their_codec(ztok, slots_folder, codec_folder, tmp_path, monkeypatch):
    # The model has not been trained: let tables that learn be worse still.
    monkeypatch.setattr("ztok_fast.codec.learned_records.encode_slots", lambda *settings: bytes(4096))
    codec, file = ("--codec", slots_folder), tmp_path / "text.ztok"
    (tmp_path / "text.txt").write_text(TEXT)
    assert ztok("compress", tmp_path / "text.txt", "-o", file, "-r", 1, "--exact", *codec).status == 0
    assert ztok("decompress", file, *codec).bytes == (tmp_path / "text.txt").read_bytes()
    assert f"{file.stat().st_size:,} bytes" in ztok("info", file, *codec).out
    assert ztok("answer", file, "Who?", "--max-new-tokens", 2, *codec).status == 0
    assert ztok("generate", file, "--max-new-ztokens", 2, "-o", tmp_path / "new.ztok", *codec).status == 0
    assert ztok("decompress", tmp_path / "new.ztok", *codec).status == 0
    assert_mistake(ztok("decompress", file, "--codec", codec_folder), "another one")
