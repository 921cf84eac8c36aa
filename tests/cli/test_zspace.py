"""``ztok generate`` and ``ztok answer``."""

import pytest

from tests.cli.conftest import TEXT, assert_mistake, load


@pytest.fixture(scope="module")
def two_documents(tmp_path_factory, codec_folder):
    from ztok_fast.cli.main import main

    folder = tmp_path_factory.mktemp("two")
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text("Another one.")
    arguments = ["compress", folder / "a.txt", folder / "b.txt", "-o", folder / "two.ztok", "--codec", codec_folder]
    assert main([str(argument) for argument in arguments]) == 0
    return folder / "two.ztok"


def test_saved_continuation_decompresses_to_what_is_printed(tiny, compressed, tmp_path, codec_folder):
    settings = ("--max-new-ztokens", 4, "--temperature", 0.9, "--top-p", 0.95, "--seed", 7)
    printed = tiny("generate", compressed, *settings)
    saved = tiny("generate", compressed, *settings, "-o", tmp_path / "new.ztok")
    z = load(codec_folder, tmp_path / "new.ztok")
    assert printed.status == saved.status == 0
    assert 1 <= z.ztokens <= 4 and f"{z.ztokens} new Z-tokens" in saved.out
    assert printed.bytes == tiny("decompress", tmp_path / "new.ztok").bytes + b"\n"


def test_seed_decides_what_is_drawn(tiny, compressed, tmp_path, codec_folder):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny("generate", compressed, "--temperature", 5, "--seed", seed, "-o", tmp_path / f"{name}.ztok")
    a, b, c = (load(codec_folder, tmp_path / f"{name}.ztok") for name in "abc")
    assert a == b and a != c


def test_documents_are_told_apart(tiny, two_documents):
    for arguments in (("generate", two_documents, "--max-new-ztokens", 2), ("answer", two_documents, "Who?")):
        result = tiny(*arguments)
        assert result.status == 0
        assert result.out.startswith("document 0:\n") and "\ndocument 1:\n" in result.out


def test_answer_prints_what_the_codec_answers(tiny, compressed, codec_folder):
    from ztok_fast.codec.codec import ZTokCodec

    result = tiny("answer", compressed, "Where did the cat sit?", "--max-new-tokens", 5)
    codec = ZTokCodec.from_pretrained(codec_folder)
    expected = codec.answer(load(codec_folder, compressed), "Where did the cat sit?", max_new_tokens=5)
    assert result.status == 0 and result.out == expected + "\n"


def test_mistakes(tiny, ztok, compressed, other_codec_folder, tmp_path):
    assert_mistake(tiny("generate", compressed, "--max-new-ztokens", 0), "max_new_ztokens")
    assert_mistake(tiny("generate", compressed, "--temperature", "-1"), "temperature")
    assert_mistake(tiny("generate", compressed, "--top-p", 0), "top_p")
    assert_mistake(tiny("generate", compressed, "-o", tmp_path / "out.txt"), "ends in .ztok")
    assert_mistake(tiny("answer", compressed, "Who?", "--max-new-tokens", 0), "max_new_tokens")
    assert_mistake(tiny("answer", tmp_path / "none.ztok", "Who?"), "no such file")
    assert_mistake(tiny("answer", compressed, "caf\udce9?"), "QUESTION", "encoding")
    assert_mistake(ztok("answer", compressed, "Who?", "--codec", other_codec_folder), "fingerprint")


def test_coded_units_are_decoded_first_and_that_is_said(tiny, two_documents, tmp_path):
    texts = [two_documents.parent / name for name in ("a.txt", "b.txt")]
    coded = tmp_path / "coded.ztok"
    assert tiny("compress", *texts, "-o", coded, "--units", "coded", "--context", 64).status == 0
    for command in (("generate", "--max-new-ztokens", 2), ("answer", "Who?")):
        learned, decoded = (tiny(command[0], file, *command[1:]) for file in (two_documents, coded))
        assert decoded.status == 0 and decoded.bytes == learned.bytes
        assert decoded.err.startswith(f"ztok: note: {command[0]} {coded}: a model cannot read coded units")
        assert not learned.err
