"""`python -m bench`: what it writes, what it refuses, and that a wrong answer has no speed."""

import json

import pytest

from bench import __main__ as command
from bench.micro import results, session
from ztok_fast.ops import requirements
from ztok_fast.ops.ragged import reference

CASE = "ragged_pack[B=3,S=7,D=5]/float32/forward"


def bench(tmp_path, *arguments):
    """Run the command in this process (torch is loaded already, so nothing can be pinned)."""
    argv = ["--set", "tiny", "--seconds", "0.01", "--json", str(tmp_path / "out.json"), *arguments]
    return command.run(command.parse(argv), argv)


def off_by_one(padded, cu_seqlens, total):
    return reference.ragged_pack(padded, cu_seqlens, total).roll(1, 0)


def raises(padded, cu_seqlens, total):
    raise RuntimeError("no such kernel image")


@pytest.mark.parametrize(
    ("function", "status", "reason"),
    [("off_by_one", "wrong", "elements differ"), ("raises", "failed", "RuntimeError: no such kernel image")],
)
def test_a_backend_that_is_wrong_gets_no_speed_and_fails_the_command(
    tmp_path, monkeypatch, capsys, function, status, reason
):
    row = requirements.Requirement("ragged_pack", "broken", f"{__name__}:{function}", ("cpu",))
    monkeypatch.setattr(requirements, "REQUIREMENTS", (row, *requirements.REQUIREMENTS))
    assert bench(tmp_path, "--ops", "ragged_pack", "--cases", CASE, "--backends", "broken", "reference") == 1
    case = next(case for case in results.load(tmp_path / "out.json")["cases"] if case["key"] == CASE)
    by_name = {entry["name"]: entry for entry in case["contenders"]}
    assert by_name["broken"]["default"]  # it stands first in the table, without any change to the registry
    assert by_name["broken"]["status"] == status and reason in by_name["broken"]["reason"]
    assert not results.TIME_FIELDS & by_name["broken"].keys()
    assert by_name["reference"]["status"] == "ok" and by_name["boolean mask"]["status"] == "ok"
    captured = capsys.readouterr()
    assert f"WRONG {CASE}: broken: {status}" in captured.err
    line = next(line for line in captured.out.splitlines() if line.startswith("| broken"))
    assert status in line and "×" not in line.split("|")[-2]


def test_a_wrong_peer_gets_no_speed_but_the_command_succeeds(tmp_path, monkeypatch):
    from bench.micro.case import Peer
    from bench.micro.registry import OPS

    op = OPS["ragged_pack"]
    liar = Peer("liar", lambda case, inputs: lambda: (inputs["padded"][:, 0], ()), lambda found: found)
    monkeypatch.setitem(OPS, "ragged_pack", op.__class__(**{**vars(op), "peers": (liar,)}))
    assert bench(tmp_path, "--ops", "ragged_pack", "--cases", CASE) == 0
    entries = {e["name"]: e for c in results.load(tmp_path / "out.json")["cases"] for e in c["contenders"]}
    assert entries["liar"]["status"] == "wrong" and "seconds" not in entries["liar"]


def test_a_peer_that_is_not_installed_is_missing_and_no_error(tmp_path, monkeypatch):
    from bench.micro import runner

    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    assert bench(tmp_path, "--ops", "codebook_assign", "--cases", "M=33", "--backends", "reference") == 0
    entries = {e["name"]: e for c in results.load(tmp_path / "out.json")["cases"] for e in c["contenders"]}
    assert entries["faiss"]["status"] == "missing"
    assert entries["faiss"]["reason"] == "faiss-cpu is not installed"


def test_results_are_added_to_and_replaced_case_by_case(tmp_path):
    assert bench(tmp_path, "--ops", "ragged_pack", "--backends", "--peers", "copy") == 0
    first = results.load(tmp_path / "out.json")
    assert bench(tmp_path, "--ops", "ragged_unpack", "--backends", "--peers", "copy") == 0
    assert bench(tmp_path, "--ops", "ragged_pack", "--cases", f"{CASE}", "--backends", "--peers", "copy", "clone") == 0
    found = results.load(tmp_path / "out.json")
    assert [case["op"] for case in found["cases"]].count("ragged_pack") == 2 * 1
    assert len(found["runs"]) >= 2 and set(found["runs"]) == {case["run"] for case in found["cases"]}
    renewed = next(case for case in found["cases"] if case["key"] == CASE)
    assert results.contender(renewed, "clone") and renewed["run"] not in first["runs"]


def test_what_is_recorded_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    assert bench(tmp_path, "--ops", "ragged_pack", "--cases", CASE, "--backends", "--peers", "copy") == 0
    (facts,) = results.load(tmp_path / "out.json")["runs"].values()
    assert facts["command"].startswith("python -m bench --set tiny")
    assert {
        "commit",
        "date",
        "threads",
        "load_average",
        "last_cache_bytes",
        "python",
        "packages",
        "cpu",
    } <= facts.keys()
    assert facts["variables"]["OPENBLAS_NUM_THREADS"] == "2"
    assert facts["marks"]["copy_gbs"] > 0 and facts["marks"]["mm_gflops"]["float32"] > 0
    assert "faiss-cpu" in facts["packages"]


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    real, calls = session.measure, []

    def measure(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(session, "measure", measure)
    assert bench(tmp_path, "--ops", "ragged_pack", "ragged_unpack", "--backends", "--peers", "copy") == 130
    assert len(results.load(tmp_path / "out.json")["cases"]) == 1
    assert "interrupted: 1 of 4 cases" in capsys.readouterr().err


def test_a_disturbed_case_is_measured_again_and_the_quietest_is_kept(tmp_path, monkeypatch):
    real, shares = session.measure, iter([0.5, 0.2, 0.3, 0.01, 0.0])

    def measure(*arguments, **options):
        return {**real(*arguments, **options), "disturbance": {"others": next(shares), "steal": 0.0}}

    monkeypatch.setattr(session, "measure", measure)
    options = ["--ops", "ragged_pack", "--backends", "--peers", "copy", "--undisturbed", "0.1"]
    assert bench(tmp_path, *options) == 0
    cases = results.load(tmp_path / "out.json")["cases"]
    assert [case["disturbance"]["others"] for case in cases] == [0.2, 0.01]

    assert bench(tmp_path, *options[:-2], "--disturbed", "0.1") == 0
    cases = results.load(tmp_path / "out.json")["cases"]
    assert [case["disturbance"]["others"] for case in cases] == [0.0, 0.01]


def test_a_time_limit_leaves_the_rest_out(tmp_path, capsys):
    assert bench(tmp_path, "--ops", "ragged_pack", "--limit", "0", "--backends", "--peers", "copy") == 0
    assert "2 of 2 cases were not started" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "nothing"], "ops: expected some of"),
        (["--cases", "no such text"], "no case is selected"),
        (["--device", "cuda"], "device: expected cpu or an available CUDA device"),
        (["--device", "abacus"], "device"),
    ],
)
def test_what_cannot_be_done_is_an_error(tmp_path, capsys, arguments, message):
    import torch

    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is one here")
    assert bench(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_results_file_is_left_alone(tmp_path, capsys):
    (tmp_path / "out.json").write_text('{"points": []}')
    assert bench(tmp_path, "--ops", "ragged_pack") == 2
    assert "expected schema 1" in capsys.readouterr().err
    assert json.loads((tmp_path / "out.json").read_text()) == {"points": []}


def test_the_list(tmp_path, capsys):
    assert bench(tmp_path, "--list", "--ops", "ragged_pack") == 0
    assert CASE in capsys.readouterr().out.splitlines()


def test_plots_are_drawn_from_the_file(tmp_path):
    pytest.importorskip("matplotlib")
    assert bench(tmp_path, "--ops", "ragged_pack", "codebook_assign", "--plots", str(tmp_path / "figures")) == 0
    assert (tmp_path / "figures" / "bench-cpu-roofline.png").stat().st_size > 1000
