import contextlib
import gc
import time

import pytest

from bench import machine
from bench.timing import Timed, take_turns


def slow(log, name):
    def call():
        log.append(name)
        time.sleep(0.001)  # longer than a sample must be, so that a sample is one call

    return call


def test_entries_take_turns_and_every_other_round_runs_backwards():
    log = []
    found = take_turns([Timed(name, [slow(log, name)], contextlib.nullcontext) for name in "abc"], 1e-6, min_rounds=4)
    assert "".join(log[-12:]) == "abccbaabccba"
    assert list(found) == ["a", "b", "c"]
    for own in found.values():
        assert (own["rounds"], own["calls_per_sample"]) == (4, 1) and 0.001 <= own["min"] <= own["median"]


def test_a_short_call_is_repeated_within_a_sample():
    found = take_turns([Timed("a", [lambda: None], contextlib.nullcontext)], seconds=0.02)
    assert found["a"]["calls_per_sample"] > 100


def test_input_sets_are_used_in_turn():
    own = Timed("a", [0, 1, 2], contextlib.nullcontext, repeats=2)
    assert [call for _ in range(3) for call in own.next_calls()] == [0, 1, 2, 0, 1, 2]


def test_the_context_is_entered_around_every_sample_and_not_timed_and_garbage_collection_is_off():
    log, seen = [], []

    @contextlib.contextmanager
    def context():
        log.append("in")
        seen.append(gc.isenabled())
        time.sleep(0.005)
        yield
        log.append("out")

    found = take_turns([Timed("a", [slow(log, "call")], context)], seconds=1e-6, min_rounds=2)
    assert log[-6:] == ["in", "call", "out"] * 2
    assert found["a"]["min"] < 0.005
    assert not any(seen) and gc.isenabled()


def test_the_process_starts_anew_with_the_pinned_variables(monkeypatch):
    started = []
    monkeypatch.setattr(machine.os, "execve", lambda program, argv, env: started.append((argv, env)))
    for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="GOMP_SPINCOUNT must be set before torch is imported"):
        machine.restart_with_pinned_environment([], None)
    monkeypatch.delitem(machine.sys.modules, "torch")
    machine.restart_with_pinned_environment(["--list"], 3)
    ((argv, env),) = started
    assert argv[1:] == ["-m", "bench", "--list"]
    assert env["GOMP_SPINCOUNT"] == "0" and env["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")  # what the user set is left alone
    machine.restart_with_pinned_environment([], None)
    assert len(started) == 1
