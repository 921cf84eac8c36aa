"""The registry: complete, verified on small shapes with every backend present, and with checks that see one wrong element."""

import dataclasses
import importlib.util
import json

import pytest
import torch

from bench.micro import results, runner
from bench.micro.case import BACKWARD, FORWARD, SETS, Mismatch
from bench.micro.registry import OPS, interleave, select
from ztok_fast.ops import requirements

CPU = torch.device("cpu")
TINY = select(None, "tiny", "cpu")
MARKS = {"mm_gflops": {"float32": 100.0}, "copy_gbs": 20.0}
DIFFERENTIABLE = set(OPS) - {"z_select"}


def ids(case):
    return case.key


def inputs_of(case):
    return OPS[case.op].make(case, CPU, torch.Generator().manual_seed(3))


def test_every_op_is_in_the_requirements_table():
    assert set(OPS) <= set(requirements.ops())
    for op in OPS.values():
        assert set(op.companions) <= set(requirements.ops())
        assert all(case.op == op.name for case in op.cases)


def test_keys_are_unique_and_every_op_has_small_cases_for_both_passes():
    keys = [case.key for op in OPS.values() for case in op.cases]
    assert len(keys) == len(set(keys))
    for name, op in OPS.items():
        passes = {case.direction for case in op.cases if case.set == "tiny"}
        assert passes == ({FORWARD, BACKWARD} if name in DIFFERENTIABLE else {FORWARD})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sets_contain_one_another(device):
    quick, default, full = ({case.key for case in select(None, name, device)} for name in ("quick", "default", "full"))
    assert quick < default < full
    assert not full & {case.key for case in TINY}


def test_the_nearest_code_grid_is_complete_in_the_full_set():
    sizes = {tuple(case.shape.values()) for case in select(["codebook_assign"], "full", "cpu")}
    grid = {(M, V, d) for M in (1, 256, 4096, 65536) for V in (1024, 4096, 65536) for d in (16, 64, 128, 576, 1024)}
    assert grid <= sizes


def test_a_run_that_may_be_cut_short_takes_the_ops_in_turn():
    cases = select(None, "default", "cpu")
    mixed = interleave(cases)
    assert sorted(case.key for case in mixed) == sorted(case.key for case in cases)
    assert [case.op for case in mixed[: len(OPS)]] == list(OPS)
    assert [case for case in mixed if case.op == "lora_linear"] == [case for case in cases if case.op == "lora_linear"]


@pytest.mark.parametrize(("ops", "name", "message"), [(["none"], "quick", "ops: "), (None, "huge", "set: ")])
def test_a_wrong_selection_is_an_error(ops, name, message):
    with pytest.raises(ValueError, match=message):
        select(ops, name, "cpu")


def test_a_selection_by_text():
    chosen = select(None, "default", "cpu", ["d=64]"])
    assert chosen and all("d=64]" in case.key for case in chosen)


@pytest.mark.parametrize("case", TINY, ids=ids)
def test_every_contender_is_right_and_timed(case):
    entry = runner.measure(OPS[case.op], case, CPU, 0.01, MARKS)
    entry["run"] = "r"
    results.validate({"schema": results.SCHEMA, "runs": {"r": {}}, "cases": [json.loads(json.dumps(entry))]})
    by_name = {contender["name"]: contender for contender in entry["contenders"]}
    assert by_name["reference"]["status"] == "ok" and by_name["reference"]["checked"]
    assert not runner.wrong_backends(entry)
    for peer in OPS[case.op].peers:
        contender = by_name[peer.name]
        absent = peer.package is not None and importlib.util.find_spec(peer.package) is None
        assert contender["status"] in (("missing", "skipped") if absent else ("ok", "skipped")), contender["reason"]
        if contender["status"] == "ok":
            assert contender["checked"] == (peer.read is not None)
            assert contender["seconds"]["min"] <= contender["seconds"]["median"]
            assert 0 < contender["gbs"] and 0 < contender["roofline"]
    assert sum(contender.get("default", False) for contender in entry["contenders"]) == 1


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


@pytest.mark.parametrize("case", TINY, ids=ids)
def test_the_check_sees_one_wrong_element_of_any_result(case):
    """Codes too: another code is farther away, in every row of these random inputs."""
    op, inputs = OPS[case.op], inputs_of(case)
    found = op.run(case, inputs)
    op.check(case, inputs, found)
    paths = list(tensors_in(found))
    assert paths
    for path, tensor in paths:
        with pytest.raises(Mismatch):
            op.check(case, inputs, replaced(found, path, corrupted(tensor)))


@pytest.mark.parametrize("case", [case for case in TINY if OPS[case.op].check_peer], ids=ids)
def test_the_check_of_peers_sees_a_wrong_answer(case):
    op = OPS[case.op]
    peers = [
        p for p in op.peers if p.read and not p.refuses(case) and (not p.package or importlib.util.find_spec(p.package))
    ]
    inputs = inputs_of(case)
    for peer in peers:
        found = peer.read(peer.prepare(case, inputs)())
        op.check_peer(case, inputs, found)
        path, tensor = next(tensors_in(found))
        shifted = tensor.detach().roll(1, 0) if tensor.is_floating_point() else (tensor + 1) % 5
        shifted = ~tensor if tensor.dtype == torch.bool else shifted
        with pytest.raises(Mismatch):
            op.check_peer(case, inputs, replaced(found, path, shifted))


def test_sets_and_devices_are_known():
    for op in OPS.values():
        for case in op.cases:
            assert case.set in SETS and set(case.devices) <= {"cpu", "cuda"}
            assert case.dtype.is_floating_point
            assert dataclasses.replace(case, set="full").key == case.key
