"""Stages: their times add up, nothing is recorded outside of a measurement or in other threads."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from ztok_fast import profiling
from ztok_fast.profiling import HEAD, MODEL, REST, TOKENISE, count_rows, host_share, profile, stage


def test_stages_add_up_and_those_inside_others_count_once(monkeypatch):
    """By a clock that moves only when it is told to, so that a busy machine changes nothing."""
    now = 1000

    def wait(nanoseconds):
        nonlocal now
        now += nanoseconds

    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter_ns=lambda: now))
    with profile() as found:
        wait(3)
        with stage(MODEL, rows=3, layers=2):
            wait(10)
            with stage(HEAD):
                wait(20)
            wait(5)
        wait(7)
    nanoseconds = {name: round(value * 1e9) for name, value in found.seconds().items() if value}
    assert [span.name for span in found.spans] == [HEAD, MODEL]
    assert (found.spans[1].rows, found.spans[1].layers) == (3, 2)
    assert nanoseconds == {MODEL: 15, HEAD: 20, REST: 10} and found.nanoseconds == 45


def test_nothing_is_recorded_without_a_measurement():
    assert stage(MODEL) is stage(HEAD) and not profiling.measuring()
    count_rows(1, 2)
    with profile() as found:
        pass
    assert not found.spans and found.occupancy is None


def test_other_threads_are_not_recorded():
    def other():
        with stage(HEAD):
            count_rows(1, 2)

    with profile() as found:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert not found.spans and not found.counters


def test_two_measurements_at_once_are_refused_and_an_error_ends_one():
    with pytest.raises(RuntimeError, match="expected no other measurement"), profile(), profile():
        pass
    assert not profiling.measuring()


def test_occupancy_is_rows_over_places():
    with profile() as found:
        count_rows(4, 4)
        count_rows(1, 4)
    assert found.occupancy == 5 / 8


def test_trace_has_every_stage_within_the_whole(tmp_path):
    with profile() as found:
        with stage(TOKENISE):
            count_rows(2, 3)
        with stage(MODEL, rows=7):
            pass
    found.write_trace(tmp_path / "trace.json", "all")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    boxes = {event["name"]: event for event in events if event["ph"] == "X"}
    assert set(boxes) == {"all", TOKENISE, MODEL} and boxes[MODEL]["args"] == {"rows": 7}
    for event in boxes.values():
        assert 0 <= event["ts"] and event["ts"] + event["dur"] <= boxes["all"]["dur"]
    (counter,) = [event for event in events if event["ph"] == "C"]
    assert counter["args"] == {"running": 2, "ended": 1}


def shares(call):
    """Host shares of three calls: on a busy machine any one may be interrupted for long."""
    return [host_share(call) for _ in range(3)]


def test_host_share_is_time_outside_of_ops(capfd):
    x = torch.randn(600, 600)
    assert max(shares(lambda: time.sleep(0.05))) > 0.95
    assert min(shares(lambda: [x @ x for _ in range(20)])) < 0.3
    assert capfd.readouterr().err == ""


def test_time_in_the_tokenizer_is_no_host_time():
    def tokenizing():
        with stage(TOKENISE):
            time.sleep(0.05)

    assert min(shares(tokenizing)) < 0.2
