"""``ztok eval`` and the demo."""

import gzip
import json

import pytest
import torch

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


def test_table_and_json_hold_every_variant(tiny, rows, tmp_path):
    result = tiny("eval", rows, "--exclude", "closed", "--tokens", 24, "--json", tmp_path / "out" / "result.json")
    assert result.status == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["documents"] == 2 and found["tokens"] <= 48
    variants = [("learned", 2), ("fixed", 2), ("learned", 1)]
    assert [(row["budget"], row["units"], row["levels"]) for row in found["rows"]] == [
        (budget, *variant) for budget in (2.0, 4.0) for variant in variants
    ]
    table = result.out.split("\n\n")[1].splitlines()
    assert len(table) == 1 + len(found["rows"])
    for line, row in zip(table[1:], found["rows"]):
        assert line.split()[:3] == [f"{row['budget']:g}", row["units"], str(row["levels"])]
        assert f"{100 * row['free_running']:.1f} %" in line and f"{100 * row['teacher_forced']:.1f} %" in line
        assert f"{row['rate']:.2f}" in line and f"{row['loss_bits']:.2f}" in line
    assert f"{found['base']['bits_per_token']:.2f} bits per token" in result.out
    rates = {(row["units"], row["levels"]): row["rate"] for row in found["rows"] if row["budget"] == 2}
    assert rates["learned", 1] < rates["learned", 2]


def test_sample_that_ships_is_the_default(tiny, codec):
    result = tiny("eval", "--ratio", 3, "--tokens", 64)
    assert result.status == 0 and result.out.startswith("1 documents, 64 tokens;")
    tokens = codec.tokenizer(SAMPLE.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][:64]
    expected = evaluate(codec, [tokens], [3.0])
    assert f"{expected['base']['bits_per_token']:.2f} bits per token" in result.out
    assert f"{expected['3']['loss_bits']:.2f}" in result.out.split("\n\n")[1].splitlines()[1]


def test_mistakes(tiny, rows, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"words": "not"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    assert_mistake(tiny("eval", tmp_path / "bad.jsonl"), "bad.jsonl, line 2", "'text'")
    assert_mistake(tiny("eval", tmp_path / "empty.jsonl"), "empty.jsonl", "at least one row")
    assert_mistake(tiny("eval", tmp_path / "none.jsonl"), "no such file")
    assert_mistake(tiny("eval", rows, "--documents", 0), "--documents")
    assert_mistake(tiny("eval", rows, "--json", tmp_path), "got a folder")
    assert_mistake(tiny("eval", "--ratio", 2, 77), "ratio", "got 77")


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
    lines = {line[:36].strip(): line[36:].split() for line in out.splitlines()}
    assert lines["text tokens"] == [str(len(m.tokens))] * 2
    assert lines["Z-tokens"][1] == str(m.z.ztokens)
    assert lines["achieved ratio"][1] == f"{m.z.achieved_ratio:.2f}"
    assert lines["rate, bits per token"][1] == f"{m.z.rate:.2f}"
    assert lines["exact mode: every byte came back"] == ["yes", "yes"]
    assert float(lines["exact mode: bits per token in all"][1]) > m.z.rate
    for budget in "24":
        assert f"The text as it came back at r = {budget}, wrong tokens in {{braces}}:" in out
    marked = out.split("Where its ")[2].split("\n\n", 1)[1]
    assert marked.count("|") == m.z.ztokens
    assert "".join(marked.replace("|", "").split()) == "".join(SAMPLE.read_text(encoding="utf-8").split())


def test_demo_reports_mistakes_plainly(capsys, tmp_path):
    assert demo.main(["--text", str(tmp_path / "none.txt")]) == 2
    assert capsys.readouterr().err == f"ztok: error: {tmp_path / 'none.txt'}: there is no such file\n"
    assert demo.main(["--ratio", "much"]) == 2
