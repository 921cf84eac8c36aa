"""`python -m bench`: what it writes, what it refuses, and that a wrong answer has no speed."""

import dataclasses
import json

import pytest
import torch

from bench import __main__ as command
from bench import results, runner, session
from bench.registry import OPS
from bench.subject import Baseline, same
from ztok_fast.ops import backends
from ztok_fast.ops.op import OPS as DECLARED
from ztok_fast.ops.quantize import reference

CASE = "residual_quantize[M=19,L=3,V=31,d=6]/float32/forward"


def bench(tmp_path, *arguments):
    """Run the command in this process (torch is loaded already, so nothing can be pinned)."""
    argv = ["--set", "tiny", "--seconds", "0.01", "--json", str(tmp_path / "out.json"), *arguments]
    return command.run(command.parse(argv), argv)


def measured(tmp_path, key=CASE):
    case = next(case for case in results.load(tmp_path / "out.json")["cases"] if case["key"] == key)
    return {own["name"]: own for own in case["implementations"]}


def off_by_one(latents, codebooks, levels):
    quantized, *rest = reference.residual_quantize(latents, codebooks, levels)
    return quantized.roll(1, 0), *rest


def raises(latents, codebooks, levels):
    raise RuntimeError("no such kernel image")


def break_op(monkeypatch, function):
    """Put a backend "cuda" that is wrong before all others of `residual_quantize`."""
    op = DECLARED["residual_quantize"]
    monkeypatch.setattr(op, "_chosen", {})
    monkeypatch.setattr(op, "backends", (backends.Backend("cuda", function, contiguous=True), *op.backends))


@pytest.mark.parametrize(
    ("function", "status", "reason"),
    [(off_by_one, "wrong", "quantized"), (raises, "failed", "RuntimeError: no such kernel image")],
)
def test_a_backend_that_is_wrong_gets_no_speed_and_fails_the_command(
    tmp_path, monkeypatch, capsys, function, status, reason
):
    break_op(monkeypatch, function)
    only = ["--ops", "residual_quantize", "--cases", CASE]
    assert bench(tmp_path, *only, "--backends", "cuda", "reference") == 1
    found = measured(tmp_path)
    assert found["cuda"]["default"]  # it stands first, without any change to the registry
    assert found["cuda"]["status"] == status and reason in found["cuda"]["reason"]
    assert not {"seconds", "gflops", "gbs", "roofline"} & found["cuda"].keys()
    assert found["reference"]["status"] == "ok" and found["addmm+argmin by level"]["status"] == "ok"
    captured = capsys.readouterr()
    assert f"WRONG {CASE}: cuda: {status}" in captured.err
    line = next(line for line in captured.out.splitlines() if line.startswith("| cuda"))
    assert status in line and "×" not in line.split("|")[-2]
    assert bench(tmp_path, *only, "--check", "--backends", "cuda") == 1
    assert f"WRONG {CASE}: cuda: {status}" in capsys.readouterr().out


def test_small_cases_are_checked_once_without_a_results_file(tmp_path, capsys):
    assert bench(tmp_path, "--ops", "residual_quantize", "--check", "--backends", "reference") == 0
    assert not (tmp_path / "out.json").exists()
    assert "2 runs of backends, 0 red" in capsys.readouterr().out


def test_a_wrong_baseline_gets_no_speed_but_the_command_succeeds(tmp_path, monkeypatch):
    liar = Baseline("liar", lambda case, inputs: lambda: torch.zeros(case["M"], case["L"]).int(), same)
    monkeypatch.setitem(OPS, "residual_quantize", dataclasses.replace(OPS["residual_quantize"], baselines=(liar,)))
    assert bench(tmp_path, "--ops", "residual_quantize", "--cases", CASE) == 0
    assert measured(tmp_path)["liar"]["status"] == "wrong" and "seconds" not in measured(tmp_path)["liar"]


def test_a_baseline_that_is_not_installed_is_missing_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    assert bench(tmp_path, "--ops", "codebook_assign", "--cases", "M=33", "--backends", "reference") == 0
    faiss = measured(tmp_path, "codebook_assign[M=33,V=50,d=12]/float32/forward")["faiss"]
    assert (faiss["status"], faiss["reason"]) == ("missing", "faiss-cpu is not installed")


ONE = ["--backends", "--baselines", "addmm+argmin", "addmm+argmin by level"]


def test_results_are_added_to_and_replaced_case_by_case(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    assert bench(tmp_path, "--ops", "residual_quantize", *ONE) == 0
    first = results.load(tmp_path / "out.json")
    assert bench(tmp_path, "--ops", "codebook_assign", *ONE) == 0
    assert bench(tmp_path, "--ops", "residual_quantize", "--cases", CASE, *ONE) == 0
    found = results.load(tmp_path / "out.json")
    assert [case["op"] for case in found["cases"]].count("residual_quantize") == 2
    assert len(found["runs"]) >= 2 and set(found["runs"]) == {case["run"] for case in found["cases"]}
    renewed = next(case for case in found["cases"] if case["key"] == CASE)
    assert results.measured(renewed, "addmm+argmin by level") and renewed["run"] not in first["runs"]
    for facts in found["runs"].values():  # what is recorded of the machine
        assert facts["command"].startswith("python -m bench --set tiny")
        recorded = {"commit", "date", "threads", "load_average", "last_cache_bytes", "python", "packages", "cpu"}
        assert recorded <= facts.keys() and "faiss-cpu" in facts["packages"]
        assert facts["variables"]["OPENBLAS_NUM_THREADS"] == "2"
        assert facts["marks"]["copy_gbs"] > 0 and facts["marks"]["mm_gflops"]["float32"] > 0


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    real, calls = session.measure, []

    def measure(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(session, "measure", measure)
    assert bench(tmp_path, "--ops", "residual_quantize", "codebook_assign", *ONE) == 130
    assert len(results.load(tmp_path / "out.json")["cases"]) == 1
    assert "interrupted: 1 of 4 cases" in capsys.readouterr().err


def test_a_time_limit_leaves_the_rest_out_and_the_list_shows_it(tmp_path, capsys):
    assert bench(tmp_path, "--ops", "residual_quantize", "--limit", "0", *ONE) == 0
    assert "2 of 2 cases were not started" in capsys.readouterr().out
    assert bench(tmp_path, "--list", "--ops", "residual_quantize") == 0
    assert CASE in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "nothing"], "ops: expected some of"), (["--cases", "no such text"], "no case is selected"),
        (["--device", "cuda"], "device: expected cpu or an available CUDA device"), (["--device", "abacus"], "device"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_an_error(tmp_path, capsys, arguments, message):
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is one here")
    assert bench(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--seconds", "0"), ("--threads", "0"), ("--set", "huge")])
def test_bad_arguments_are_errors(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        command.parse([option, value])
    assert stop.value.code == 2 and f"argument {option}" in capsys.readouterr().err.replace("error: --", "argument --")


def test_a_file_that_is_no_results_file_is_left_alone(tmp_path, capsys):
    (tmp_path / "out.json").write_text('{"points": []}')
    assert bench(tmp_path, "--ops", "residual_quantize") == 2
    assert "expected schema 2" in capsys.readouterr().err
    assert json.loads((tmp_path / "out.json").read_text()) == {"points": []}


def test_plots_are_drawn_from_the_file(tmp_path):
    pytest.importorskip("matplotlib")
    only = ["--ops", "residual_quantize", "codebook_assign", "--backends", "cpp", "reference", "--baselines"]
    assert bench(tmp_path, *only, "--plots", str(tmp_path / "figures")) == 0
    assert (tmp_path / "figures" / "bench-cpu-roofline.png").stat().st_size > 1000
