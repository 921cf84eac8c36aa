"""The README and the model cards are written from the results."""

import json

import pytest
import torch

from bench import card as cards
from bench import compression, documents
from bench.card import CardError, StaleResultsError, card
from bench.documents import DocumentError
from bench.machine import ROOT
from bench.tables import number, table
from bench.tiny import write_texts, write_tiny_base
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.weights import codec_fingerprint, save_weights


def test_the_readme_shows_the_results_in_the_repository():
    assert documents.main(["readme", "--check"]) == 0


def test_a_block_is_replaced_and_what_is_around_it_kept():
    text = "before\n<!-- x -->\nold\n\\1 old\n<!-- end of x -->\nafter\n"
    assert documents.fill_block(text, "x", "a\\1b") == "before\n<!-- x -->\na\\1b\n<!-- end of x -->\nafter\n"
    assert "<!-- demo output -->" in documents.README.read_text()
    with pytest.raises(DocumentError, match="expected one block 'y'"):
        documents.fill_block(text, "y", "new")


ENVIRONMENT = {
    "command": "ztok eval dev.jsonl --json tiny.json",
    "python": "3.11",
    "packages": {"torch": "2.13", "transformers": None, "peft": "0.21"},
    "cpu": {"model": "A CPU", "threads": 1},
    "cuda": {"devices": []},
}
MADE_WITH = "Measured by `ztok eval dev.jsonl --json tiny.json` (Python 3.11; torch 2.13; peft 0.21; A CPU, 1 thread)."


def evaluation(way, **values):
    row = {"way": way, "asked": 4.0, "documents": 2, "segments": 3, "tokens": 1234, "bytes": 5678}
    row |= {"rate": 5.5, "plain_rate": 6.0, "vocabulary_bits": 11.0, "own_bits": 4.75, "residual_bits": 0.25}
    row |= {"teacher_forced": 0.9876, "free_running": 0.9012, "bleu": 77.7, "exact_segments": 0.5, "told": 0.625}
    return row | {"ratio": 4.01, "near": 1.0, "efficiency": 0.82, "total_bits": 5.75} | values


def results(name="tiny", fingerprint=""):
    return {
        "codec": {"name": name, "fingerprint": fingerprint},
        "families": {"dev": [evaluation("codec"), evaluation("truncation", free_running=0.4)]},
        "environment": ENVIRONMENT,
    }


def test_measured_tables_hold_the_results_of_codecs_and_their_command(tmp_path):
    assert documents.measured(tmp_path) == "No results file is in `docs/results` yet."
    (tmp_path / "tiny.json").write_text(json.dumps(results()))
    text = documents.measured(tmp_path)
    assert "98.8 %" in text and "90.1 %" in text and "1,234 text tokens" in text and text.endswith(MADE_WITH)
    assert "40.0 %" not in text, "that way is for the card"
    questions = {"codec": {"name": "tiny"}, "families": {"squad": [{"way": "full text", "f1": 0.5}]}}
    (tmp_path / "answers-tiny.json").write_text(json.dumps(questions))
    (tmp_path / "generation.json").write_text("[]")
    assert documents.measured(tmp_path) == text


EVALUATIONS = {
    "metrics.jsonl": {"written": 0.616, "ratio": 6.34},
    "compressor-metrics.jsonl": {"symbol_bits": {"4": 5.24, "16": 3.23}, "draft_accuracy": {"4": 0.85, "16": 0.36}},
    "inferencer-metrics.jsonl": {"bits_per_ztoken": 42.03, "uniform_bits": 62.37},
}


def write_metrics(path, steps, every, found):
    rows = [{"step": step, **({"eval": found} if step % every == 0 else {})} for step in range(1, steps + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A codec folder with settings and weights; its results and its words are where the command looks for them."""
    model, config, state = tmp_path / "tiny", ZTokConfig(base_model="tiny"), {"weight": torch.arange(3.0)}
    model.mkdir()
    config.save(model)
    save_weights(model, state, None)
    for name, found in EVALUATIONS.items():
        write_metrics(model / name, 41, 2, found)
    (tmp_path / "tiny.json").write_text(json.dumps(results(fingerprint=codec_fingerprint(config, state))))
    (tmp_path / "tiny.md").write_text("What it is.\n\n---\n\nHow it came.\n\n---\n\nWhat it cannot do.\n")
    monkeypatch.setattr(cards, "RESULTS", tmp_path)
    monkeypatch.setattr(cards, "CARDS", tmp_path)
    return model


def test_a_card_is_written_from_the_files_of_its_folder(folder):
    assert documents.main(["card", str(folder)]) == 0
    text = (folder / "README.md").read_text()
    for words in ("# tiny\n\nWhat it is.\n", "## Training\n\nHow it came.\n", "## Limits\n\nWhat it cannot do.\n"):
        assert words in text
    assert "| 4   | codec " in text and "| 4   | truncation |" in text and MADE_WITH in text
    assert "### dev\n" in text and "\n## dev" not in text
    assert "The decompressor: 41 steps." in text and "|   40 |  61.6 % |  6.34 |" in text
    assert "| step | r = 4 | r = 16 |" in text and "|   40 |  5.24 |   3.23 |" in text
    assert "|            42.03 |        62.37 |" in text
    size = f"{(folder / 'codec.safetensors').stat().st_size:,}"
    (line,) = [line for line in text.splitlines() if line.startswith("| codec.safetensors |")]
    assert line.split("|")[2].strip() == size and "metrics.jsonl |" not in text
    assert "| base_model " in text


def test_a_card_is_checked(folder, capsys):
    assert documents.main(["card", "--check", str(folder)]) == 1 and not (folder / "README.md").exists()
    assert documents.main(["card", str(folder)]) == 0 == documents.main(["card", "--check", str(folder)])
    (folder / "inferencer-metrics.jsonl").unlink()
    assert documents.main(["card", "--check", str(folder)]) == 1
    assert "not the card of its files" in capsys.readouterr().err
    assert "inferencer" not in card(folder)


def test_results_of_other_codecs_and_weights_are_refused(folder, capsys):
    path = folder.parent / "tiny.json"
    found = json.loads(path.read_text())
    for change, message in (
        ({"codec": {"name": "another", "fingerprint": ""}}, "expected results of tiny, got those of another"),
        ({"codec": {"name": "tiny", "fingerprint": "0" * 64}}, "got those of 0000000000000000...: run ztok eval again"),
    ):
        path.write_text(json.dumps(found | change))
        with pytest.raises(CardError, match=message):
            card(folder)
    for missing, message in (("environment", "expected the command"), ("families", "file without families")):
        path.write_text(json.dumps({name: value for name, value in found.items() if name != missing}))
        with pytest.raises(CardError, match=message):
            card(folder)
    path.unlink()
    assert documents.main(["card", str(folder)]) == 1
    assert "results: expected the file" in capsys.readouterr().err


def test_words_and_metrics_that_do_not_fit_are_refused(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1, "eval": {"2": {"teacher_forced": 0.5}}}\n')
    with pytest.raises(CardError, match="evaluations of a decompressor of slots, got one without 'written'"):
        card(folder)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(CardError, match="at least one step"):
        card(folder)
    (folder.parent / "tiny.md").write_text("What it is.\n")
    with pytest.raises(CardError, match="expected 3 parts"):
        card(folder)


def test_a_training_table_is_thinned_to_the_last_evaluation(folder):
    write_metrics(folder / "metrics.jsonl", 99, 1, EVALUATIONS["metrics.jsonl"])
    table = card(folder).split("The decompressor: 99 steps.")[1].split("The compressor")[0]
    steps = [int(line.split("|")[1]) for line in table.splitlines() if line.startswith("|") and "61.6" in line]
    assert 4 <= len(steps) <= 8 and steps[-1] == 99 and steps == sorted(steps)
    write_metrics(folder / "metrics.jsonl", 20, 100, {})
    assert "The decompressor: 20 steps. The run ended before its first evaluation." in card(folder)


@pytest.mark.parametrize("name", ["ztok-mini", "ztok-smollm2-135m"])
def test_cards_that_ship_are_those_of_their_files(name):
    folder = ROOT / "ztok_fast" / "models" / name
    try:
        expected = card(folder)
    except StaleResultsError as error:
        pytest.skip(str(error))
    assert (folder / "README.md").read_text(encoding="utf-8") == expected, "run python -m bench.documents card"


def test_the_commands_of_compression_agree_on_a_models_own_bits(tmp_path):
    texts = write_texts(tmp_path / "texts.jsonl", 3)
    given = [str(texts), "--base", str(write_tiny_base(tmp_path / "base", texts)), "--json", str(tmp_path / "out.json")]

    def rows(command, *options):
        compression.main([command, *given, *options])
        return json.loads((tmp_path / "out.json").read_text())

    long, short = rows("bits", "--contexts", "64", "8")
    assert long["tokens"] == short["tokens"] > 100 and long["bits_per_token"] > 0
    (window,) = rows("windows", "--context", "64", "--levels", "2", "--codebook-size", "300")
    assert window["H0"] == pytest.approx(long["bits_per_token"], rel=0.02) and window["of_H0"] > 1
    (coded,) = rows("contexts", "--contexts", "64", "--runs", "1", "--cpu-time")
    assert coded["bits_per_byte"] == pytest.approx(long["bits_per_byte"], rel=0.1)


def test_exact_files_of_a_codec_are_measured(tmp_path):
    texts, out = write_texts(tmp_path / "texts.jsonl", 3), tmp_path / "out.json"
    compression.main(
        ["exact", str(texts), "--codec", "ztok-mini", "--ratio", "8", "--documents", "1", "--json", str(out)]
    )
    (row,) = json.loads(out.read_text())
    assert row["r"] == 8 and 0 < row["remainder"] < row["own_bits"] < row["files_of_one"]
    assert row["files_of_one_/_own"] == pytest.approx(row["files_of_one"] / row["own_bits"])


def test_tables():
    text = table(["name", "n"], [["a", "1"], ["bcd", "–"]])
    assert text == "| name |   n |\n| ---- | --: |\n| a    |   1 |\n| bcd  |   – |"
    assert number(None) == number(float("nan")) == "–" and number(1.239) == "1.24"
    with pytest.raises(ValueError, match="expected rows of 2 cells, got 1"):
        table(["a", "b"], [["x"]])
