"""The README and the model cards are written from the results."""

import json
from pathlib import Path

import pytest

from bench import documents
from bench.documents import CARDS, DocumentError, training_table, write_card
from bench.tables import number, table
from ztok_fast.codec.config import ZTokConfig

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_shows_the_results_in_the_repository():
    assert documents.main(["readme", "--check"]) == 0


def test_a_block_is_replaced_and_what_is_around_it_kept():
    text = "before\n<!-- x -->\nold\n\\1 old\n<!-- end of x -->\nafter\n"
    assert documents.fill_block(text, "x", "a\\1b") == "before\n<!-- x -->\na\\1b\n<!-- end of x -->\nafter\n"
    assert "<!-- demo output -->" in documents.README.read_text()
    with pytest.raises(DocumentError, match="expected one block 'y'"):
        documents.fill_block(text, "y", "new")


ENVIRONMENT = {
    "command": "python -m bench.curves --codec tiny",
    "commit": "abc",
    "python": "3.11",
    "packages": {"torch": "2.13", "transformers": None, "peft": "0.21"},
    "cpu": {"model": "A CPU", "cores": 2, "threads": 1},
    "cuda": {"devices": []},
}


EVALUATION = {"teacher_forced": 0.9876, "free_running": 0.9012, "ratio": 2.01, "rate": 5.5}


def results():
    point = {"units": "learned", "levels": 2, "budget": 2.0, "loss_bits": 0.25, **EVALUATION}
    few = {**point, "levels": 1, "rate": 3.5, "free_running": 0.4}
    return {
        "environment": ENVIRONMENT,
        "codec": {"name": "tiny", "num_codebooks": 2},
        "data": {"files": ["dev.jsonl"], "exclude_sources": [], "documents": 2, "tokens": 1234},
        "base": {"bits_per_token": 4.75, "accuracy": 0.333},
        "points": [few, point],
        "unit_lengths": {"2": [{"length": 1, "units": 3, "bits_per_token": 7.25}]},
    }


def test_measured_tables_hold_the_results_and_their_command(tmp_path):
    assert documents.measured(tmp_path) == "No results file is in `docs/results` yet."
    (tmp_path / "tiny.json").write_text(json.dumps(results()))
    text = documents.measured(tmp_path)
    assert "98.8 %" in text and "90.1 %" in text and "40.0 %" not in text
    assert "4.75" in text and "33.3 %" in text and "1,234 text tokens" in text
    assert "`python -m bench.curves --codec tiny` (commit abc; Python 3.11; torch 2.13; peft 0.21; A CPU" in text


@pytest.fixture
def card_files(tmp_path):
    run, model, evaluation = tmp_path / "run", tmp_path / "tiny", tmp_path / "tiny.json"
    run.mkdir()
    model.mkdir()
    (model / "config.json").write_text(json.dumps(ZTokConfig(base_model="tiny").to_dict()))
    (model / "codec.safetensors").write_bytes(bytes(1234))
    use = {"codes_alive": [16, 15], "perplexity": [12.4, 11.0]}
    evaluated = {"eval": {"base": {}, "2": EVALUATION}}
    rows = [{"step": step, **use, **(evaluated if step % 2 == 0 else {})} for step in range(1, 42)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation.write_text(json.dumps(results()))
    return run, model, evaluation


def test_a_card_is_written_from_the_files_and_again_from_the_copy(card_files):
    run, model, evaluation = card_files
    words = CARDS / "ztok-smollm2-135m.md"
    card = write_card(run, model, evaluation, words).read_text()
    assert "98.8 %" in card and "| codec.safetensors |" in card and "1,234" in card
    assert "Last step: 41. Codes in use, level by level: 16, 15" in card
    assert "python -m bench.curves --codec tiny" in card and "$" not in card
    assert write_card(model, model, evaluation, words).read_text() == card


def test_a_card_of_another_codec_is_refused(card_files):
    run, model, evaluation = card_files
    other = results()
    other["codec"]["name"] = "another"
    evaluation.write_text(json.dumps(other))
    with pytest.raises(DocumentError, match="expected results of tiny, got those of another"):
        write_card(run, model, evaluation, CARDS / "ztok-smollm2-135m.md")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(DocumentError, match="run: expected the file"):
        write_card(run, model, evaluation, CARDS / "ztok-smollm2-135m.md")


def test_the_training_table_is_thinned_to_the_last_evaluation():
    own = {"eval": {"base": {}, "2": EVALUATION}, "codes_alive": [1], "perplexity": [1.0]}
    rows = [{"step": n, **own} for n in range(1, 100)]
    steps = [int(line.split("|")[1]) for line in training_table(rows).splitlines()[2:] if line.startswith("|")]
    assert len(steps) <= 8 and steps[-1] == 99 and steps == sorted(steps)


def test_a_run_that_ended_before_its_first_evaluation_says_so():
    text = training_table([{"step": 1, "accuracy": 0.25}, {"step": 20, "accuracy": 0.5}])
    assert "after 20 steps, before its first evaluation" in text and "25.0 %" in text and "50.0 %" in text
    with pytest.raises(DocumentError, match="at least one step"):
        training_table([])


def test_tables():
    text = table(["name", "n"], [["a", "1"], ["bcd", "–"]])
    assert text == "| name |   n |\n| ---- | --: |\n| a    |   1 |\n| bcd  |   – |"
    assert number(None) == number(float("nan")) == "–" and number(1.239) == "1.24"
    with pytest.raises(ValueError, match="expected rows of 2 cells, got 1"):
        table(["a", "b"], [["x"]])
