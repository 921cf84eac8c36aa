"""Runs every op test over the backends that are present.

A test that asks for `backend` and carries `@pytest.mark.op("name")` runs once per backend of the op and device; what
cannot run on this machine is skipped with the backend's own reason. Inside the test the backend is forced, and `device`
is the device to put the inputs on. The backward pass of the op is forced along with it; a backend that has none of its
own is tested with the reference's.
"""

from contextlib import ExitStack
from fnmatch import fnmatch

import pytest
import torch

import ztok_fast
from ztok_fast.ops import backends
from ztok_fast.ops.op import OPS

DEVICES = ("cpu", "cuda")


# Tests that take Triton's interpreter more than a second or two are slow tests there, but for some cases of each.
SLOW_WHEN_INTERPRETED = (
    "test_matches_float64*",
    "test_equal_codes_go_to_the_lowest_index*",
    "test_rows_that_are_not_finite*",
    "test_repeats_bitwise_whatever_else_is_in_the_batch*",
    "test_gradients_match_float64*",
    "test_sampling_follows_the_distribution*",
    "test_draws_of_rows_steps_and_seeds_are_independent*",
    "test_row_ids_default_to_the_position*",
    "test_a_draw_does_not_depend_on_the_batch*",
    "test_of_equal_logits_the_lowest_code*",
)
QUICK_EVEN_INTERPRETED = (
    "test_of_equal_logits_the_lowest_code[[]triton-cpu-65]",
    "test_matches_float64*-one_code-cosine]",
    "test_matches_float64*-wide-l2]",
    "test_matches_float64*-bfloat16-dot]",
    "test_matches_float64*-near_ties-l2]",
    "test_equal_codes_go_to_the_lowest_index*-l2-duplicates]",
    "test_rows_that_are_not_finite[[]triton-cpu-inf-l2]",
)


def pytest_collection_modifyitems(items):
    for item in items:
        call = getattr(item, "callspec", None)
        interpreted = call and call.params.get("backend") == "triton" and backends.triton_is_interpreted()
        if interpreted and _matches(item, SLOW_WHEN_INTERPRETED) and not _matches(item, QUICK_EVEN_INTERPRETED):
            item.add_marker(pytest.mark.slow)


def _matches(item, patterns):
    return any(fnmatch(item.name, pattern) for pattern in patterns)


def pytest_configure(config):
    config.addinivalue_line("markers", "op(name): the op under test; decides which backends it runs over")
    config.addinivalue_line("markers", "dtype(dtype): the dtype of the op's tensors, which not every backend takes")


def backend_cases(op):
    """A parameter (backend, device) for each backend of an op on each device; skipped, with why, if it cannot run."""
    for device in DEVICES:
        for row in OPS[op].backends:
            if not row.runs_on(device):
                continue
            reasons = list(row.unmet(torch.device(device), forced=True))
            if device == "cuda" and not torch.cuda.is_available():
                reasons.append("no CUDA device")
            marks = pytest.mark.skip(reason="; ".join(reasons)) if reasons else ()
            yield pytest.param(row.name, device, id=f"{row.name}-{device}", marks=marks)


def missing(op, backend, device):
    """Why a backend of an op cannot run on a device."""
    row = next(row for row in OPS[op].backends if row.name == backend)
    return list(row.unmet(torch.device(device), forced=True))


def pytest_generate_tests(metafunc):
    if "backend" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("op")
    if marker is None:
        raise pytest.UsageError(f"{metafunc.definition.nodeid} uses `backend` without @pytest.mark.op")
    if "device" not in metafunc.fixturenames:
        raise pytest.UsageError(f"{metafunc.definition.nodeid} uses `backend` without `device`")
    metafunc.parametrize(("backend", "device"), list(backend_cases(*marker.args)), indirect=["backend"])


def dtypes_of(op, backend):
    """The dtypes that a backend takes an op's tensors in."""
    return next(row.dtypes for row in OPS[op].backends if row.name == backend)


def skip_beyond_rows(op, backend, rows):
    """Skip a test of more rows than the CUDA C++ kernels for few take; another backend has them."""
    if backend == "cuda" and rows > 64:
        pytest.skip(f"the {backend} backend of {op} takes at most 64 rows")


@pytest.fixture
def backend(request):
    """The backend under test, forced for its op while the test runs.

    Skips where the backend does not take the test's dtype: that of its marker, or of its parameter `dtype`.
    """
    op = request.node.get_closest_marker("op").args[0]
    marker = request.node.get_closest_marker("dtype")
    dtype = marker.args[0] if marker else request.node.callspec.params.get("dtype")
    if dtype is not None and dtype.is_floating_point and dtype not in dtypes_of(op, request.param):
        pytest.skip(f"{request.param} does not take {dtype}")
    with ExitStack() as forced:
        forced.enter_context(ztok_fast.backend(request.param, ops=[op]))
        backward = f"{op}_backward"
        if backward in OPS and not OPS[backward].has(request.param):
            forced.enter_context(ztok_fast.backend("reference", ops=[backward]))
        yield request.param


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def value_checks(monkeypatch):
    """Values are checked on a GPU too; on the CPU they always are."""
    monkeypatch.setenv("ZTOK_DEBUG_CHECKS", "1")
