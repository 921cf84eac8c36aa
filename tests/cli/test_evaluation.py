"""``ztok eval`` and the demo."""

import gzip
import json
import shlex

import pytest
import torch

import ztok_fast
from tests.cli.conftest import TEXT, assert_mistake
from ztok_fast import demo
from ztok_fast.cli.evaluation import SAMPLE
from ztok_fast.cli.measure import measure
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.train.evaluate import evaluate


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    texts = [TEXT, "A second text of some length, told plainly.", "Left out."]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for index, text in enumerate(texts):
            file.write(json.dumps({"text": text, "source": "closed:x" if index == 2 else "open:y"}) + "\n")
    return path


@pytest.fixture(scope="module")
def codec(codec_folder):
    return ZTokCodec.from_pretrained(codec_folder)


def test_tables_and_json_hold_every_way(tiny, rows, tmp_path):
    outputs = ["--json", tmp_path / "out" / "result.json", "--markdown", tmp_path / "out" / "result.md"]
    result = tiny("eval", rows, "--exclude", "closed", "--tokens", 24, *outputs)
    assert result.status == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (tmp_path / "out" / "result.md").read_text(encoding="utf-8") == result.out
    assert list(found["families"]) == ["rows"] and found["codec"]["name"] == "tiny"
    arguments = [str(one) for one in ("eval", rows, "--exclude", "closed", "--tokens", 24, *outputs)]
    command = shlex.split(found["environment"]["command"])
    assert command[0] == "ztok" and set(arguments) <= set(command) and found["environment"]["cpu"]["threads"] >= 1
    own = found["families"]["rows"]
    ways = ["codec", "without compressor", "fixed units", "token ids", "truncation", "coded text"]
    assert [(row["asked"], row["way"]) for row in own] == [(r, way) for r in (2.0, 4.0) for way in ways]
    assert all(row["documents"] == 2 and row["tokens"] <= 48 for row in own)
    table = [line for line in result.out.splitlines() if line.startswith("|")][2:]
    for line, row in zip(table, own, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:2] == [f"{row['asked']:g}", row["way"]]
        assert cells[2] == f"{row['rate']:.2f}" and cells[5] == f"{row['efficiency']:.2f}"
        assert cells[8] == f"{100 * row['free_running']:.1f} %"


def test_sample_that_ships_is_the_default(tiny, codec):
    result = tiny("eval", "--ratio", 3, "--tokens", 64, "--ways", "codec")
    assert result.status == 0 and "## demo" in result.out
    ends = codec.tokenizer(SAMPLE.read_text(encoding="utf-8"), return_offsets_mapping=True)["offset_mapping"]
    expected = ztok_fast.evaluate(codec, [SAMPLE.read_text(encoding="utf-8")[: ends[63][1]]], 3.0)
    (line,) = [line for line in result.out.splitlines() if line.startswith("| 3")]
    assert f"| {expected.residual_bits:8.2f} |" in line and "64 tokens" in result.out
    assert f"Own bits H₀: {expected.own_bits:.2f}" in result.out


def test_a_folder_stands_for_its_files(tiny, rows, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "Another family."}\n')
    (tmp_path / "notes.txt").write_text("not read")
    result = tiny("eval", tmp_path, "--ratio", 2, "--ways", "token ids", "codec")
    assert result.status == 0 and result.out.count("\n## ") == 2
    assert result.out.startswith("## All families") and "| other  |" in result.out and "| rows   |" in result.out


def test_plot(tiny, rows, tmp_path):
    pytest.importorskip("matplotlib")
    assert tiny("eval", rows, "--ratio", 2, "--plot", tmp_path / "figure.png").status == 0
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_mistakes(tiny, rows, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"words": "not"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "nothing").mkdir()
    assert_mistake(tiny("eval", tmp_path / "bad.jsonl"), "bad.jsonl, line 2", "'text'")
    assert_mistake(tiny("eval", tmp_path / "empty.jsonl"), "empty.jsonl", "at least one row")
    assert_mistake(tiny("eval", rows, "--exclude", "open", "--exclude", "closed"), "outside of open, closed")
    assert_mistake(tiny("eval", tmp_path / "none.jsonl"), "no such file")
    assert_mistake(tiny("eval", tmp_path / "nothing"), "expected a folder with .jsonl")
    assert_mistake(tiny("eval", rows, rows), "files of different names")
    assert_mistake(tiny("eval", rows, "--documents", 0), "--documents")
    assert_mistake(tiny("eval", rows, "--json", tmp_path), "got a folder")
    assert_mistake(tiny("eval", "--ratio", 2, 77), "ratio", "got 77")
    assert_mistake(tiny("eval", rows, "--ways", "open loop"), "ways: expected some of codec", "got 'open loop'")


# The demo


def test_measurement_agrees_with_evaluation(codec):
    """Two ways to the same numbers: the codec's own methods here, packed passes there."""
    text = SAMPLE.read_text(encoding="utf-8")
    m = measure(codec, text, 4)
    expected = evaluate(codec, [m.tokens], [4.0])
    assert m.free_running == pytest.approx(expected["4"]["free_running"])
    assert m.teacher_forced == pytest.approx(expected["4"]["teacher_forced"])
    assert m.z.achieved_ratio == pytest.approx(expected["4"]["ratio"]) and m.z.rate == pytest.approx(
        expected["4"]["rate"]
    )
    assert m.base_bits == pytest.approx(expected["base"]["bits_per_token"], rel=1e-4)
    correlation = m.surprisal_by_length()[2]
    assert correlation == pytest.approx(expected["4"]["length_surprisal_correlation"], abs=1e-3)


def test_surprisal_by_length(codec):
    m = measure(codec, TEXT, 2)
    lengths = m.z.unit_lengths.long()
    m.surprisal = (1.0 / lengths)[torch.repeat_interleave(torch.arange(len(lengths)), lengths)]
    short, long, correlation = m.surprisal_by_length()
    assert short == 1.0 and long <= 1 / 3 and correlation < -0.8


def test_measure_refuses_an_empty_text(codec):
    with pytest.raises(ValueError, match="empty text"):
        measure(codec, "", 2)


def test_demo_prints_every_number_and_both_texts(codec_folder, codec, capsys):
    assert demo.main(["--codec", str(codec_folder), "--ratio", "2", "4"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    m = measure(codec, SAMPLE.read_text(encoding="utf-8"), 4)
    lines = {
        name.strip(): rest.split() for name, rest in (line.split("  ", 1) for line in out.splitlines() if "  " in line)
    }
    assert lines["text tokens"] == [str(len(m.tokens))] * 2
    assert lines["Z-tokens"][1] == str(m.z.ztokens)
    assert lines["achieved ratio"][1] == f"{m.z.achieved_ratio:.2f}"
    assert lines["rate, bits per token: codes at full width"][1] == f"{m.z.rate:.2f}"
    codec.save(m.z, codec_folder / "x.ztok")
    size = (codec_folder / "x.ztok").stat().st_size
    assert lines["the file, in bytes"][1] == f"{size:,}"
    rate = 8 * size / len(m.tokens)
    assert lines["rate, bits per token: all of the file"][1] == f"{rate:.2f}"
    assert lines["efficiency of the file (bits saved / spent)"][1] == f"{(m.base_bits - m.residual_bits) / rate:.2f}"
    assert lines["exact mode: every byte came back"] == ["yes", "yes"]
    assert int(lines["exact mode: the file, in bytes"][1].replace(",", "")) > size
    for budget in "24":
        assert f"The text as it came back at r = {budget}, wrong tokens in {{braces}}:" in out
    marked = out.split("Where its ")[2].split("\n\n", 1)[1]
    assert marked.count("|") == m.z.ztokens
    assert "".join(marked.replace("|", "").split()) == "".join(SAMPLE.read_text(encoding="utf-8").split())


def test_demo_reports_mistakes_plainly(capsys, tmp_path):
    assert demo.main(["--text", str(tmp_path / "none.txt")]) == 2
    assert capsys.readouterr().err == f"ztok: error: {tmp_path / 'none.txt'}: there is no such file\n"
    assert demo.main(["--ratio", "much"]) == 2


@pytest.fixture
def questions(tmp_path):
    """Four rows with questions, one of them long and one of a source that may be left out."""
    path = tmp_path / "questions.jsonl"
    rows = [{"text": f"The cat sat on mat {i}." * (40 if i == 1 else 1), "question": "Who sat?"} for i in range(4)]
    rows[0]["answer"], rows[1]["answer"], rows[3]["answer"] = "cat", "cat", "cat"
    rows[2] |= {"answers": ["cat", "the cat on the mat"], "answer": "a cat"}
    rows[3]["source"] = "closed:x"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_by_way(ztok, slots_folder, other_codec_folder, questions, tmp_path):
    outputs = ["--json", tmp_path / "out.json", "--markdown", tmp_path / "out.md"]
    ways = ["--ways", "no context", "full text", "Z-tokens", "--reader", other_codec_folder]
    chosen = ["--ratio", 2, 4, "--tokens", 64, "--exclude", "closed"]
    result = ztok("eval", questions, "--questions", *chosen, *ways, *outputs, "--codec", slots_folder)
    assert result.status == 0 and "1 of 3 questions are left out" in result.err
    found = json.loads((tmp_path / "out.json").read_text())
    assert (tmp_path / "out.md").read_text(encoding="utf-8") == result.out
    assert found["settings"]["reader"] == str(other_codec_folder) and found["codec"]["name"] == "slots"
    own = found["families"]["questions"]
    ways = ["full text", "Z-tokens", "no context"]
    assert [(row["asked"], row["way"]) for row in own] == [(r, way) for r in (2.0, 4.0) for way in ways]
    assert [row["reader"] for row in own[:3]] == ["other inferencer", "inferencer", "other inferencer"]
    assert all(row["items"] == 2 for row in own)
    table = [line for line in result.out.splitlines() if line.startswith("|")][2:]
    for line, row in zip(table, own, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:3] == [f"{row['asked']:g}", row["way"], row["reader"]]
        assert cells[3] == f"{row['positions']:.1f}" and cells[4] == f"{100 * row['f1']:.1f} %"


def test_a_base_model_reads(ztok, slots_folder, base_folder, questions):
    chosen = ["--ratio", 4, "--documents", 2, "--ways", "no context", "Z-tokens"]
    result = ztok("eval", questions, "--questions", *chosen, "--reader", base_folder, "--codec", slots_folder)
    rows = [[cell.strip() for cell in line.split("|")] for line in result.out.splitlines() if line.startswith("| 4")]
    assert [row[2:4] for row in rows] == [["Z-tokens", "inferencer"], ["no context", base_folder.name]]


def test_mistakes_of_questions(tiny, questions, rows, tmp_path):
    assert_mistake(tiny("eval", "--questions"), "--questions", "expected files")
    assert_mistake(tiny("eval", rows, "--questions"), "rows.jsonl.gz", "items[0]: question", "got None")
    assert_mistake(tiny("eval", questions, "--questions", "--tokens", 1), "questions.jsonl", "at most 1 tokens")
    assert_mistake(tiny("eval", questions, "--questions", "--plot", tmp_path / "x.png"), "--plot", "none")
    assert_mistake(tiny("eval", questions, "--questions", "--ways", "written tokens"), "ways: expected", "full text")
    assert_mistake(tiny("eval", questions, "--reader", "x"), "--reader", "with --questions")
    assert_mistake(tiny("eval", questions, "--questions", "--reader", tmp_path / "none"), "base model", "not found")
