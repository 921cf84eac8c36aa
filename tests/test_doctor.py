import json

import pytest
import torch

from ztok_fast import doctor
from ztok_fast.ops import backends
from ztok_fast.ops.backends import Backend
from ztok_fast.ops.op import OPS


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv("ZTOK_BACKEND", raising=False)
    monkeypatch.setattr(backends._forced, "by_op", {})


@pytest.fixture
def with_backends(monkeypatch):
    """Puts backends before and after those of `codebook_assign`."""

    def put(*before, after=()):
        op = OPS["codebook_assign"]
        monkeypatch.setattr(op, "backends", (*before, *op.backends, *after))

    return put


def force(monkeypatch, name):
    """What the environment variable does when the package is imported."""
    monkeypatch.setenv("ZTOK_BACKEND", name)
    monkeypatch.setattr(backends._forced, "by_op", {None: name})


def test_prints_every_op_with_its_backend(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in text
    section = text.split("ops on cpu")[1].split("ops on")[0]
    # a line with an op is indented by two columns, the reasons below it by more
    words = [line.split() for line in section.splitlines() if line.startswith("  ") and line[2] != " "]
    chosen = dict(words)
    assert set(chosen) == set(OPS)
    for name, backend in chosen.items():
        assert OPS[name].has(backend)


def test_json_says_the_same_as_the_table(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["environment"]["packages"]["torch"] == torch.__version__
    assert set(report["native"]["parts"]) == {"cpu", "cuda", "host"}
    for entry in report["ops"]:
        assert {entry["backend"], *entry["others"]} == {backend.name for backend in OPS[entry["op"]].backends}
        assert all(entry["others"].values())


def test_what_is_said_to_run_is_what_runs():
    for entry in doctor.collect()["ops"]:
        op = OPS[entry["op"]]
        if op.spec is not None and entry["device"] == "cpu":
            x = torch.ones(2, 4)
            unconditional = [b for b in op.backends if b.condition is None]
            assert op._able(None, x.device, (x.dtype,))[0].name == entry["backend"] or not unconditional


def test_says_why_a_backend_is_not_chosen(capsys, with_backends):
    with_backends(Backend("gpu", "nowhere:nothing", "cuda"), after=[Backend("slower", "nowhere:nothing")])
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "not gpu: runs on cuda, not on cpu" in text
    chosen = doctor.op_report(OPS["codebook_assign"], torch.device("cpu"))["backend"]
    assert f"not slower: {chosen} is preferred" in text


def test_says_where_a_backend_is_chosen_by_shape(with_backends):
    with_backends(Backend("few", "nowhere:nothing", condition=("there is one row", lambda x, *_: x.shape[0] == 1)))
    report = doctor.op_report(OPS["codebook_assign"], torch.device("cpu"))
    assert report["backend"] == "few" and report["others"]["reference"] == ["few is preferred where there is one row"]


def test_forced_backend_shows(capsys, monkeypatch, with_backends):
    with_backends(Backend("fast", "nowhere:nothing"))
    force(monkeypatch, "reference")
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "ZTOK_BACKEND = reference" in text and "not fast: ZTOK_BACKEND forces reference" in text


@pytest.mark.parametrize("name", ["cuda", "no-such-backend"])
def test_an_op_without_backend_fails(capsys, monkeypatch, name):
    force(monkeypatch, name)
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "NONE: " in text and name in text


def test_missing_packages_are_said(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package-anywhere"))
    assert doctor.main([]) == 0
    assert "no-such-package-anywhere not installed" in capsys.readouterr().out
