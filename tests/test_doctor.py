import json

import pytest
import torch

from ztok_fast import doctor
from ztok_fast.ops import requirements


def test_prints_every_op_with_its_backend(capsys, monkeypatch):
    monkeypatch.delenv("ZTOK_BACKEND", raising=False)
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in text
    section = text.split("ops on cpu")[1].split("ops on")[0]
    # a line with an op is indented by two columns, the reasons below it by more
    words = [line.split() for line in section.splitlines() if line.startswith("  ") and line[2] != " "]
    chosen = {op: backend for op, backend in words}
    assert set(chosen) == set(requirements.ops())
    assert set(chosen.values()) <= set(requirements.backends())


def test_json_says_the_same_as_the_table(capsys, monkeypatch):
    monkeypatch.delenv("ZTOK_BACKEND", raising=False)
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["environment"]["packages"]["torch"] == torch.__version__
    assert set(report["native"]["parts"]) == {"cpu", "cuda", "host"}
    for entry in report["ops"]:
        backends = {row.backend for row in requirements.rows_of(entry["op"])}
        assert {entry["backend"], *entry["others"]} == backends
        assert all(entry["others"].values())


def test_says_why_a_backend_is_not_chosen(capsys, monkeypatch):
    monkeypatch.delenv("ZTOK_BACKEND", raising=False)
    rows = (
        requirements.Requirement("codebook_assign", "gpu", "nowhere:nothing", device_types=("cuda",)),
        *requirements.REQUIREMENTS,
        requirements.Requirement("codebook_assign", "slower", "nowhere:nothing"),
    )
    monkeypatch.setattr(requirements, "REQUIREMENTS", rows)
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "not gpu: runs on cuda, not on cpu" in text
    chosen = next(
        e["backend"] for e in doctor.collect()["ops"] if e["op"] == "codebook_assign" and e["device"] == "cpu"
    )
    assert f"not slower: {chosen} is preferred" in text


def test_forced_backend_shows(capsys, monkeypatch):
    rows = (requirements.Requirement("codebook_assign", "fast", "nowhere:nothing"), *requirements.REQUIREMENTS)
    monkeypatch.setattr(requirements, "REQUIREMENTS", rows)
    monkeypatch.setenv("ZTOK_BACKEND", "reference")
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "ZTOK_BACKEND = reference" in text and "not fast: ZTOK_BACKEND forces reference" in text


@pytest.mark.parametrize("name", ["fast", "no-such-backend"])
def test_an_op_without_backend_fails(capsys, monkeypatch, name):
    rows = (requirements.Requirement("codebook_assign", "fast", "nowhere:nothing"), *requirements.REQUIREMENTS)
    monkeypatch.setattr(requirements, "REQUIREMENTS", rows)
    monkeypatch.setenv("ZTOK_BACKEND", name)
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "NONE: " in text and name in text


def test_missing_packages_are_said(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package-anywhere"))
    assert doctor.main([]) == 0
    assert "no-such-package-anywhere not installed" in capsys.readouterr().out
