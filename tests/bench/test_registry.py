"""The registry: complete, right on small shapes with every backend present, and its checks see one wrong element."""

import importlib.util

import pytest
import torch

from bench import registry, results, runner
from bench.registry import OPS, interleave, select
from ztok_fast.ops import op as declared
from ztok_fast.ops.spec import BACKWARD, FORWARD, SETS, Mismatch

CPU = torch.device("cpu")
TINY = [pytest.param(*pair, id=pair[0].key(pair[1])) for pair in select(None, "tiny", "cpu")]
MARKS = {"mm_gflops": {"float32": 100.0}, "copy_gbs": 20.0}


def test_keys_are_unique_and_every_op_has_small_cases_for_both_passes():
    assert set(registry._COMPARED) <= set(OPS)
    keys = [subject.key(case) for subject in OPS.values() for case in subject.cases]
    assert len(keys) == len(set(keys))
    for subject in OPS.values():
        passes = {case.direction for case in subject.cases if case.set == "tiny"}
        assert passes == ({FORWARD, BACKWARD} if subject.op.backward else {FORWARD})
        assert set(subject.companions) <= set(declared.OPS) and all(case.set in SETS for case in subject.cases)


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
    assert results.default_backend(entry), "the preferred backend must be measured"
    for own in entry["implementations"]:
        assert own["status"] in ("ok", "missing", "skipped"), own["reason"]
        assert own["checked"] or own["status"] != "ok" or own["kind"] == "mark" or "multinomial" in own["name"]
    assert results.measured(entry, "reference")


def changed(found, change):
    """Copies of nested tuples, in each of which another tensor is changed."""
    if isinstance(found, torch.Tensor):
        yield change(found)
    elif isinstance(found, tuple):
        for index, part in enumerate(found):
            for own in changed(part, change):
                parts = (*found[:index], own, *found[index + 1 :])
                yield type(found)(*parts) if hasattr(found, "_fields") else parts


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
    inputs = subject.make(case, torch.Generator().manual_seed(3))
    with runner.gradient_mode(case):
        found = subject.run(case, inputs)
    subject.check(case, inputs, found)
    wrong = list(changed(found, corrupted))
    assert wrong
    for own in wrong:
        with pytest.raises(Mismatch):
            subject.check(case, inputs, own)


def shifted(tensor):
    if tensor.dtype == torch.bool:
        return ~tensor
    return tensor.detach().roll(1, 0) if tensor.is_floating_point() else (tensor.int() + 1) % 5


@pytest.mark.parametrize(("subject", "case"), TINY)
def test_the_check_of_baselines_sees_a_wrong_answer(subject, case):
    inputs = subject.make(case, torch.Generator().manual_seed(3))
    for own in subject.baselines:
        if own.read and not own.refuses(case) and (not own.package or importlib.util.find_spec(own.package)):
            with runner.gradient_mode(case):
                found = own.read(own.prepare(case, inputs)())
            subject.check_baseline(case, inputs, found)
            with pytest.raises(Mismatch):
                subject.check_baseline(case, inputs, next(changed(found, shifted)))
