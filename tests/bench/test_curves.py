import json

import pytest
import torch

from bench import curves
from bench.tiny import SLOTS, write_tiny_codec
from ztok_fast.codec.layout import offsets, split_segments


def run(codec_folder, texts, tmp_path, *more):
    path = tmp_path / "results" / "tiny.json"
    arguments = ["--codec", str(codec_folder), "--files", str(texts), "--documents", "2", "--tokens", "40"]
    status = curves.main([*arguments, "--json", str(path), *more])
    return status, path


@pytest.fixture(scope="module")
def results(codec_folder, texts, tmp_path_factory):
    status, path = run(codec_folder, texts, tmp_path_factory.mktemp("curves"))
    assert status == 0
    return json.loads(path.read_text())


def test_every_budget_level_and_kind_of_units_is_a_point(results):
    kinds = {(p["units"], p["levels"], p["budget"]) for p in results["points"]}
    assert kinds == {(u, n, b) for u in ("learned", "fixed") for n in (1, 2) for b in (2.0, 4.0)}
    assert len(results["points"]) == len(kinds)
    assert results["data"]["tokens"] == 80 and results["codec"]["name"] == "tiny"


def test_fewer_levels_and_longer_units_cost_fewer_bits(results):
    rate = {(p["units"], p["levels"], p["budget"]): p["rate"] for p in results["points"]}
    for units in ("learned", "fixed"):
        assert rate[units, 1, 2.0] < rate[units, 2, 2.0]
        assert rate[units, 2, 4.0] < rate[units, 2, 2.0]


def test_unit_lengths_account_for_every_token(results):
    for budget, rows in results["unit_lengths"].items():
        assert sum(row["length"] * row["units"] for row in rows) == results["data"]["tokens"]
        assert all(1 <= row["length"] <= 8 for row in rows), budget


def test_surprisal_by_length_adds_up_to_that_of_the_text(codec):
    document = codec.tokenizer("The ferry leaves the small harbour at seven, and nobody reads.")["input_ids"]
    rows = curves.surprisal_by_length(codec, [document], 4.0)
    segments, _ = split_segments([len(document)], codec.config.segment_length)
    bits = codec.model.surprisal(torch.tensor(document), offsets(torch.tensor(segments)))
    assert sum(r["bits_per_token"] * r["length"] * r["units"] for r in rows) == pytest.approx(
        bits.sum().item(), rel=1e-4
    )


def test_the_tables_show_the_bound_beside_the_points(results):
    table = curves.accuracy_table(results)
    assert table.count("| learned |") == 4 and table.count("| fixed   |") == 4
    assert f"{results['base']['bits_per_token']:.2f} bits per token" in table
    assert len(curves.length_table(results).splitlines()) == 2 + sum(len(r) for r in results["unit_lengths"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--levels", "3"], "levels: expected 1 to 2"),
        (["--budgets", "99"], "ratio: expected between 1 and 8"),
        (["--exclude-sources", "own"], "expected at least one text outside"),
    ],
    ids=["levels", "budget", "sources"],
)
def test_mistakes_are_told_in_one_line(codec_folder, texts, tmp_path, arguments, message, capsys):
    status, path = run(codec_folder, texts, tmp_path, *arguments)
    assert status == 1 and not path.exists()
    assert message in capsys.readouterr().err


def test_the_figure(results, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "figures" / "tiny.png"
    curves.draw(results, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_slots_have_one_number_of_levels(texts, tmp_path, capsys):
    folder = write_tiny_codec(tmp_path / "slots", texts, **SLOTS)
    status, path = run(folder, texts, tmp_path, "--budgets", "2")
    found = json.loads(path.read_text())
    assert status == 0 and [(p["units"], p["levels"]) for p in found["points"]] == [("learned", 2), ("fixed", 2)]
    assert sum(row["length"] * row["units"] for row in found["unit_lengths"]["2"]) == found["data"]["tokens"]
    assert run(folder, texts, tmp_path, "--levels", "1")[0] == 1
    assert "levels: expected 2 to 2, got 1" in capsys.readouterr().err
