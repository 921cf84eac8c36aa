"""What the contract tests do not reach of the Triton nearest-code search: both of its paths, and its error bound."""

import pytest
import torch

from tests.ops.test_nearest import CASES, check_against_float64
from ztok_fast.ops import requirements

ROW = next(row for row in requirements.rows_of("codebook_assign") if row.backend == "triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MISSING = requirements.unmet(ROW, DEVICE, forced=True)

pytestmark = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))


@pytest.fixture(params=["whole", "by_level"])
def path(request, monkeypatch):
    """Force all levels in one launch, or a launch per level with the codebook in several parts."""
    from ztok_fast.ops.nearest import triton_configs as configs

    monkeypatch.setattr(configs, "FULL_BLOCKS", 0 if request.param == "whole" else 7)
    return request.param


QUICK = {("bfloat16", "l2"), ("zeros", "cosine"), ("one_row", "dot")}


@pytest.mark.parametrize(
    ("case", "metric"),
    [
        pytest.param(case, metric, marks=() if (case, metric) in QUICK else pytest.mark.slow)
        for case in CASES
        for metric in ("l2", "cosine", "dot")
    ],
)
def test_both_paths_match_float64(path, case, metric):
    from ztok_fast.ops.nearest import triton

    x, codebook = (tensor.to(DEVICE) for tensor in CASES[case]())
    found = triton.search(x, codebook, metric, None, quantize=True)
    undecided = ("near_ties", "midpoints", "huge_norms", "far_from_origin", "denormals", "duplicates", "all_equal")
    exact = case not in undecided and not (metric == "cosine" and case in ("one_column", "zeros"))
    check_against_float64(x, codebook, metric, found.codes, found.distances, exact)
    levels = range(codebook.shape[0])
    chosen = torch.stack([codebook[level][found.codes[:, level].long()].float() for level in levels])
    expected = torch.zeros_like(chosen[0])
    for level in levels:
        expected = expected + chosen[level]
    assert torch.equal(found.quantized, expected.to(x.dtype))
    counts = [found.codes[:, level].bincount(minlength=codebook.shape[1]) for level in levels]
    assert torch.equal(found.usage, torch.stack(counts))
