import contextlib
import time

import pytest

from bench.micro import machine
from bench.micro.timing import Contender, stats, take_turns


def logger(log, name):
    return lambda: log.append(name)


def slow(log, name):
    def call():
        log.append(name)
        time.sleep(0.001)  # longer than a sample must be, so that a sample is one call

    return call


def test_contenders_take_turns_and_every_other_round_runs_backwards():
    log = []
    contenders = [Contender(name, [slow(log, name)], contextlib.nullcontext) for name in "abc"]
    found = take_turns(contenders, seconds=1e-6, min_rounds=4)
    assert "".join(log[-12:]) == "abccbaabccba"
    assert {name: own.rounds for name, own in found.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(own.calls_per_sample == 1 and own.min >= 0.001 for own in found.values())


def test_a_short_call_is_repeated_within_a_sample():
    found = take_turns([Contender("a", [lambda: None], contextlib.nullcontext)], seconds=0.02)
    assert found["a"].calls_per_sample > 100


def test_input_sets_are_used_in_turn():
    log = []
    contender = Contender("a", [logger(log, i) for i in range(3)], contextlib.nullcontext, repeats=2)
    for _ in range(3):
        for call in contender.next_calls():
            call()
    assert log == [0, 1, 2, 0, 1, 2]


def test_the_context_is_entered_around_every_sample_and_not_timed():
    log = []

    @contextlib.contextmanager
    def context():
        log.append("in")
        time.sleep(0.005)
        yield
        log.append("out")

    found = take_turns([Contender("a", [slow(log, "call")], context)], seconds=1e-6, min_rounds=2)
    assert log[-6:] == ["in", "call", "out"] * 2
    assert found["a"].median < 0.005


def test_quartiles():
    assert stats([3.0], 1).median == 3.0
    found = stats([4.0, 1.0, 2.0, 3.0, 5.0], 7)
    assert (found.min, found.p25, found.median, found.p75) == (1.0, 2.0, 3.0, 4.0)
    assert (found.rounds, found.calls_per_sample) == (5, 7)


def test_garbage_collection_is_off_while_timing_and_on_afterwards():
    import gc

    seen = []
    take_turns([Contender("a", [lambda: seen.append(gc.isenabled())], contextlib.nullcontext)], 1e-6, min_rounds=1)
    assert not any(seen) and gc.isenabled()


def test_the_process_starts_anew_with_the_pinned_variables(monkeypatch):
    started = []
    monkeypatch.setattr(machine.os, "execve", lambda program, argv, env: started.append((argv, env)))
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delitem(machine.sys.modules, "torch")
    machine.restart_with_pinned_environment("bench", ["--list"], 3)
    ((argv, env),) = started
    assert argv[1:] == ["-m", "bench", "--list"]
    assert env["GOMP_SPINCOUNT"] == "0" and env["OMP_NUM_THREADS"] == "3"


def test_what_the_user_set_is_left_alone_and_torch_must_not_be_there_yet(monkeypatch):
    monkeypatch.setattr(machine.os, "execve", lambda *a: pytest.fail("started anew"))
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    machine.restart_with_pinned_environment("bench", [], None)
    monkeypatch.delenv("GOMP_SPINCOUNT")
    with pytest.raises(RuntimeError, match="GOMP_SPINCOUNT must be set before torch is imported"):
        machine.restart_with_pinned_environment("bench", [], None)


def test_what_other_processes_take_is_seen(tmp_path):
    import subprocess
    import sys

    if not machine._processor_ticks():
        pytest.skip("no /proc/stat")
    with machine.Disturbance() as own:
        stop = time.perf_counter() + 0.3
        while time.perf_counter() < stop:
            pass
    assert set(own.shares) == {"others", "steal"} and all(0 <= share <= 1 for share in own.shares.values())
    busy = "import time\nstop = time.perf_counter() + 0.5\nwhile time.perf_counter() < stop: pass"
    with machine.Disturbance() as others:
        subprocess.run([sys.executable, "-S", "-c", busy], check=True)
    # half a second of one processor, whatever else went on
    assert others.shares["others"] > 0
