"""The comparison of default backends with the reference sees agreement, and sees that there is none."""

import json

import pytest
import torch

from bench import agreement
from ztok_fast.codec.passes import Window

WINDOW = Window(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), torch.tensor([2, 3], dtype=torch.int32), [2])


def test_agreement_on_a_file(tmp_path, codec_folder, texts):
    target = tmp_path / "out.json"
    assert agreement.main(["--codec", str(codec_folder), "--files", str(texts), "--json", str(target)]) == 0
    rows = json.loads(target.read_text())["rows"]
    assert [row["budget"] for row in rows] == [2.0, 4.0]
    assert all(row["codes"] > 0 and row["codes that differ"] == row["documents of other units"] == 0 for row in rows)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (Window(WINDOW.codes + 1, WINDOW.lengths, [2]), (0, 4, 4)),
        (Window(WINDOW.codes, WINDOW.lengths.flip(0), [2]), (1, 0, 0)),
        (Window(WINDOW.codes, WINDOW.lengths, [1, 1]), (1, 0, 0)),
        (WINDOW, (0, 4, 0)),
    ],
)
def test_differences_are_counted(monkeypatch, other, expected):
    results = iter([[WINDOW], [other]])
    monkeypatch.setattr(agreement, "compress_windows", lambda *_: next(results))
    row = agreement.compare(type("Codec", (), {"model": None}), [[1]], 2.0)
    assert (row["documents of other units"], row["codes"], row["codes that differ"]) == expected
