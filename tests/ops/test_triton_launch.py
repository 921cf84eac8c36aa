"""Configurations of Triton kernels: one each, others only when asked for."""

import pytest
import torch

import ztok_fast.ops
from tests.ops.conftest import missing
from ztok_fast.ops import triton_launch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MISSING = missing("codebook_assign", "triton", DEVICE)

pytestmark = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))


@pytest.fixture
def tuned(monkeypatch):
    """How often a kernel was handed to `triton.autotune`."""
    monkeypatch.setattr(triton_launch, "_autotune", False)
    made = []
    make = triton_launch.Tiles._tuned
    monkeypatch.setattr(triton_launch.Tiles, "_tuned", lambda tiles: made.append(tiles) or make(tiles))
    return made


def test_nothing_is_timed_unless_it_is_asked_for(tuned):
    x, codebook = torch.randn(5, 20, device=DEVICE), torch.randn(2, 40, 20, device=DEVICE)
    with ztok_fast.backend("triton", ["residual_quantize"]):
        expected = ztok_fast.ops.residual_quantize(x, codebook)
        assert not tuned
        ztok_fast.ops.autotune()
        found = ztok_fast.ops.residual_quantize(x, codebook)
        assert tuned and all(len(tiles.configs) > 1 for tiles in tuned)
        tuned.clear()
        ztok_fast.ops.autotune(False)
        ztok_fast.ops.residual_quantize(x, codebook)
        assert not tuned
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", ["one launch", "by level"])
def test_what_a_kernel_writes_is_restored_after_a_timed_run(tuned, monkeypatch, path):
    """Residuals are overwritten in place and counts added to: timing a kernel must leave no trace."""
    from ztok_fast.ops.nearest import triton

    monkeypatch.setattr(triton, "FULL_BLOCKS", 0 if path == "one launch" else 10**6)

    def run_each(call, quantiles):
        call()
        return [0.0] * 3

    monkeypatch.setattr(triton_launch, "_untimed", run_each)
    x, codebook = torch.randn(5, 70, device=DEVICE), torch.randn(3, 40, 70, device=DEVICE)
    expected = triton.search(x, codebook, "l2", None, quantize=True)
    ztok_fast.ops.autotune()
    found = triton.search(x, codebook, "l2", None, quantize=True)
    assert tuned
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_sizes_are_cut_to_what_a_shape_needs():
    from ztok_fast.ops.nearest.triton import SEARCH

    small = SEARCH.at_most(BK=4, BN=32)
    assert (small.BK, small.BN, small.BM) == (4, 32, SEARCH.BM)
    assert SEARCH.at_most(BK=4, BN=32) is small
    assert len(small.configs) < len(SEARCH.configs)  # those that have become the same are one
    with pytest.raises(AttributeError):
        SEARCH.NOTHING  # noqa: B018
