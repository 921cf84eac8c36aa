"""The registry: complete, right on small shapes with every backend present, and its checks see one wrong element."""

import importlib.util
import json

import pytest
import torch

from bench import registry, results, runner
from bench.registry import OPS, interleave, select
from ztok_fast.ops import op as declared
from ztok_fast.ops.spec import BACKWARD, FORWARD, SETS, Mismatch

CPU = torch.device("cpu")
TINY = [pytest.param(*pair, id=pair[0].key(pair[1])) for pair in select(None, "tiny", "cpu")]
MARKS = {"mm_gflops": {"float32": 100.0}, "copy_gbs": 20.0}


def inputs_of(subject, case):
    return subject.make(case, torch.Generator().manual_seed(3))


def test_every_baseline_is_of_an_op_with_cases():
    assert set(registry._COMPARED) <= set(OPS)
    assert all(set(subject.companions) <= set(declared.OPS) for subject in OPS.values())


def test_keys_are_unique_and_every_op_has_small_cases_for_both_passes():
    keys = [subject.key(case) for subject in OPS.values() for case in subject.cases]
    assert len(keys) == len(set(keys))
    for subject in OPS.values():
        passes = {case.direction for case in subject.cases if case.set == "tiny"}
        assert passes == ({FORWARD, BACKWARD} if subject.op.backward else {FORWARD})
        for case in subject.cases:
            assert case.set in SETS and set(case.devices) <= {"cpu", "cuda"} and case.dtype.is_floating_point


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sets_contain_one_another(device):
    sets = ({s.key(case) for s, case in select(None, name, device)} for name in ("tiny", "quick", "default", "full"))
    tiny, quick, default, full = sets
    assert quick < default < full and not full & tiny


def test_a_run_that_may_be_cut_short_takes_the_ops_in_turn():
    cases = select(None, "default", "cpu")
    mixed = interleave(cases)
    assert [subject.name for subject, _ in mixed[: len(OPS)]] == list(OPS)
    for subject in OPS.values():
        assert [case for own, case in mixed if own is subject] == [case for own, case in cases if own is subject]


@pytest.mark.parametrize(("ops", "name", "message"), [(["none"], "quick", "ops: "), (None, "huge", "set: ")])
def test_a_wrong_selection_is_an_error(ops, name, message):
    with pytest.raises(ValueError, match=message):
        select(ops, name, "cpu")
    chosen = select(None, "default", "cpu", ["d=64]"])
    assert chosen and all("d=64]" in subject.key(case) for subject, case in chosen)


@pytest.mark.parametrize(("subject", "case"), TINY)
def test_every_backend_and_baseline_is_right_and_timed(subject, case):
    entry = runner.measure(subject, case, CPU, 0.01, MARKS)
    entry["run"] = "r"
    results.validate({"schema": results.SCHEMA, "runs": {"r": {}}, "cases": [json.loads(json.dumps(entry))]})
    assert results.default_backend(entry), "the preferred backend must be measured"
    for own in entry["implementations"]:
        assert own["status"] in ("ok", "missing", "skipped"), own["reason"]
        assert own["checked"] or own["status"] != "ok" or own["kind"] == "mark" or "multinomial" in own["name"]
    assert results.measured(entry, "reference")


def tensors_in(found, path=()):
    """(path, tensor) of every tensor in nested tuples."""
    if isinstance(found, torch.Tensor):
        yield path, found
    elif isinstance(found, tuple):
        for index, part in enumerate(found):
            yield from tensors_in(part, (*path, index))


def replaced(found, path, tensor):
    if not path:
        return tensor
    parts = [replaced(part, path[1:], tensor) if i == path[0] else part for i, part in enumerate(found)]
    return type(found)(*parts) if hasattr(found, "_fields") else tuple(parts)


def corrupted(tensor):
    """The same but for one element."""
    wrong = tensor.detach().clone()
    element = wrong.view(-1)[wrong.numel() // 2 :][:1]
    if wrong.dtype == torch.bool:
        element.logical_not_()
    elif wrong.is_floating_point():
        element.add_(0.05 + element.abs() * 0.05)
    else:
        element.copy_(torch.where(element == 0, element + 1, element - 1))
    return wrong


@pytest.mark.parametrize(("subject", "case"), TINY)
def test_the_check_sees_one_wrong_element_of_any_result(subject, case):
    """Codes too: another code is farther away, in every row of these random inputs."""
    inputs = inputs_of(subject, case)
    with runner.gradient_mode(case):
        found = subject.run(case, inputs)
    subject.check(case, inputs, found)
    paths = list(tensors_in(found))
    assert paths
    for path, tensor in paths:
        with pytest.raises(Mismatch):
            subject.check(case, inputs, replaced(found, path, corrupted(tensor)))


@pytest.mark.parametrize(("subject", "case"), TINY)
def test_the_check_of_baselines_sees_a_wrong_answer(subject, case):
    inputs = inputs_of(subject, case)
    for own in subject.baselines:
        if own.read and not own.refuses(case) and (not own.package or importlib.util.find_spec(own.package)):
            with runner.gradient_mode(case):
                found = own.read(own.prepare(case, inputs)())
            subject.check_baseline(case, inputs, found)
            path, tensor = next(tensors_in(found))
            shifted = tensor.detach().roll(1, 0) if tensor.is_floating_point() else (tensor.int() + 1) % 5
            shifted = ~tensor if tensor.dtype == torch.bool else shifted
            with pytest.raises(Mismatch):
                subject.check_baseline(case, inputs, replaced(found, path, shifted))
