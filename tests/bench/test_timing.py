import contextlib
import gc
import subprocess
import sys
import time

import pytest

from bench import machine
from bench.timing import Timed, stats, take_turns


def slow(log, name):
    def call():
        log.append(name)
        time.sleep(0.001)  # longer than a sample must be, so that a sample is one call

    return call


def test_entries_take_turns_and_every_other_round_runs_backwards():
    log = []
    found = take_turns([Timed(name, [slow(log, name)], contextlib.nullcontext) for name in "abc"], 1e-6, min_rounds=4)
    assert "".join(log[-12:]) == "abccbaabccba"
    assert {name: own.rounds for name, own in found.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(own.calls_per_sample == 1 and own.min >= 0.001 for own in found.values())


def test_a_short_call_is_repeated_within_a_sample():
    found = take_turns([Timed("a", [lambda: None], contextlib.nullcontext)], seconds=0.02)
    assert found["a"].calls_per_sample > 100


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
    assert found["a"].min < 0.005
    assert not any(seen) and gc.isenabled()


def test_quartiles():
    assert stats([3.0], 1).median == 3.0
    found = stats([4.0, 1.0, 2.0, 3.0, 5.0], 7)
    assert (found.min, found.p25, found.median, found.p75) == (1.0, 2.0, 3.0, 4.0)
    assert (found.rounds, found.calls_per_sample) == (5, 7)


def test_the_process_starts_anew_with_the_pinned_variables(monkeypatch):
    started = []
    monkeypatch.setattr(machine.os, "execve", lambda program, argv, env: started.append((argv, env)))
    for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="GOMP_SPINCOUNT must be set before torch is imported"):
        machine.restart_with_pinned_environment("bench", [], None)
    monkeypatch.delitem(machine.sys.modules, "torch")
    machine.restart_with_pinned_environment("bench", ["--list"], 3)
    ((argv, env),) = started
    assert argv[1:] == ["-m", "bench", "--list"]
    assert env["GOMP_SPINCOUNT"] == "0" and env["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")  # what the user set is left alone
    machine.restart_with_pinned_environment("bench", [], None)
    assert len(started) == 1


def test_what_other_processes_take_is_seen():
    if not machine._processor_ticks():
        pytest.skip("no /proc/stat")
    busy = "import time\nstop = time.perf_counter() + 0.5\nwhile time.perf_counter() < stop: pass"
    with machine.Disturbance() as others:
        subprocess.run([sys.executable, "-S", "-c", busy], check=True)
    # half a second of one processor, whatever else went on
    assert 0 < others.shares["others"] <= 1 and 0 <= others.shares["steal"] <= 1
