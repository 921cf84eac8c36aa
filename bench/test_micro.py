"""The registry under pytest-benchmark, for those who have their tools around it:

    GOMP_SPINCOUNT=0 pytest bench --benchmark-only --bench-set quick --benchmark-group-by=group -k codebook_assign

One test per case and contender, grouped by case. Contenders are measured one after another here; `python -m bench`
lets them take turns, and is what the published numbers come from.
"""

import itertools

import pytest
import torch

from bench.micro import runner
from bench.micro.registry import OPS, select

pytest.importorskip("pytest_benchmark")


def pytest_generate_tests(metafunc):
    config = metafunc.config
    device = torch.device(config.getoption("--bench-device", "cpu"))
    cases = select(None, config.getoption("--bench-set", "quick"), device.type)
    pairs = [
        pytest.param(case, name, device, id=f"{case.key}-{name}")
        for case in cases
        for name in (*runner.wanted_backends(case.op), *(peer.name for peer in OPS[case.op].peers))
    ]
    metafunc.parametrize(("case", "name", "device"), pairs)


def test_op(benchmark, case, name, device):
    op = OPS[case.op]
    sets = runner.input_sets(op, case, device)
    with runner.gradient_mode(case):
        (entrant,) = runner.verified_entrants(op, case, sets, device, [name], [name])
        if entrant.status in ("missing", "skipped"):
            pytest.skip(f"{name}: {entrant.reason}")
        if entrant.status != "ok":
            pytest.fail(f"{name}: {entrant.status}: {entrant.reason}")
        calls = itertools.cycle(entrant.calls)
        work = op.work(case, sets[0])
        benchmark.group = case.key
        benchmark.extra_info.update(flops=work.flops, bytes=work.bytes, kind=entrant.kind)

        def call():
            next(calls)()
            if device.type == "cuda":
                torch.cuda.synchronize()

        with entrant.context():
            benchmark(call)
