"""The benchmarks of the engine's passes: right on the tiny model; their checks see one wrong bit or token."""

import pytest
import torch

from bench import read_bandwidth, results, runner
from bench.engine import packed
from bench.registry import PASSES, select
from ztok_fast.ops.spec import Mismatch

CPU = torch.device("cpu")
MARKS = {"mm_gflops": {"float32": 100.0}, "copy_gbs": 20.0}


@pytest.mark.parametrize("name", PASSES)
def test_the_tiny_case_is_checked_and_timed(name):
    ((subject, case),) = select([name], "tiny", "cpu")
    entry = runner.measure(subject, case, CPU, 0.01, MARKS)
    (ours,) = entry["implementations"]
    assert ours["status"] == "ok" and ours["checked"] and results.seconds(ours) > 0


@pytest.mark.parametrize("name", PASSES)
def test_the_check_sees_one_wrong_bit_and_one_wrong_token(name):
    ((subject, case),) = select([name], "tiny", "cpu")
    inputs = subject.make(case, torch.Generator().manual_seed(1))
    hidden, tokens = subject.run(case, inputs)
    subject.check(case, inputs, (hidden, tokens))
    changed = hidden.clone()
    changed.view(torch.int32)[1, 3] ^= 1
    with pytest.raises(Mismatch, match=f"hidden states: 1 of {len(hidden)} rows"):
        subject.check(case, inputs, (changed, tokens))
    assert (tokens is None) == (name == "engine_prefill")
    if tokens is not None:
        with pytest.raises(Mismatch, match="tokens: not those of the CPU"):
            subject.check(case, inputs, (hidden, (tokens + 1) % 50))


def test_a_sequence_alone_is_checked_in_parts():
    subject, case = PASSES["engine_prefill"], next(c for c in PASSES["engine_prefill"].cases if c["sequences"] == 1)
    small = type(case)({**case.sizes, "model": "tiny", "rows": 5})
    inputs = subject.make(small, torch.Generator().manual_seed(1))
    subject.check(small, inputs, subject.run(small, inputs))


def test_read_bandwidth_times_a_step_beside_reads_of_its_bytes():
    found = read_bandwidth.measure(0.01, "tiny")
    weights, settings = packed("tiny")
    assert found.pop("bytes") == [len(weights.blob), len(weights.blob) - settings.vocabulary * settings.hidden]
    assert list(found) == ["step", "layers", "read of a step", "read of layers"]
    assert len({len(rounds) for rounds in found.values()}) == 1 and min(map(min, found.values())) > 0
