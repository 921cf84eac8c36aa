"""What the contract tests do not reach of the Triton nearest-code search: both of its paths, and its error bound."""

import pytest
import torch

from tests.ops.conftest import missing
from tests.ops.test_nearest import CASES, check_against_float64

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MISSING = missing("codebook_assign", "triton", DEVICE)

pytestmark = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))


@pytest.fixture(params=["whole", "by_level"])
def path(request, monkeypatch):
    """Force all levels in one launch, or a launch per level with the codebook in several parts."""
    from ztok_fast.ops.nearest import triton

    monkeypatch.setattr(triton, "FULL_BLOCKS", 0 if request.param == "whole" else 7)
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


def tensor_core_scores(rows, codes, offset, row_terms, code_terms):
    """float32 scores as the scan makes them, from bfloat16 terms, with the worst rounding that a tensor core may have:
    after every 16 products per pair of terms the sum loses its last two bits towards zero."""

    def terms_of(values, number):
        found = []
        for _ in range(number):
            found.append(values.bfloat16().float())
            values = values - found[-1]
        return found

    x, c = terms_of(rows, row_terms), terms_of(codes, code_terms)
    total = torch.zeros(rows.shape[0], codes.shape[0])
    for start in range(0, rows.shape[1], 16):
        for i, j in ((1, 0), (0, 1), (0, 0)):
            if i < row_terms and j < code_terms:
                step = slice(start, start + 16)
                total = (total.double() + x[i][:, step].double() @ c[j][:, step].double().T).float()
                total = (total.view(torch.int32) & ~3).view(torch.float32)
    return offset - total


@pytest.mark.parametrize("width", [16, 64, 1000])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("row_terms", "code_terms"), [(1, 1), (2, 1), (2, 2)])
def test_error_bound_holds_and_is_not_far_off(row_terms, code_terms, aligned, width):
    """Of every score; `aligned` rows and codes point the same way, where running sums and so errors are largest."""
    from ztok_fast.ops.nearest.triton_bound import error_bound

    rows, codes = torch.randn(64, width), torch.randn(128, width)
    if aligned:
        rows, codes = rows.abs(), codes.abs()
    rows = rows.bfloat16().float() if row_terms == 1 else rows
    codes = codes.bfloat16().float() if code_terms == 1 else codes
    offset = (codes.double().square().sum(1) / 2).float()
    exact = codes.double().square().sum(1) / 2 - rows.double() @ codes.double().T
    longest = codes.double().norm(dim=1).max()
    scale = longest * (rows.double().norm(dim=1, keepdim=True) + longest)
    error = (tensor_core_scores(rows, codes, offset, row_terms, code_terms).double() - exact).abs() / scale
    bound = error_bound(width, row_terms, code_terms)
    assert error.max() <= bound
    if aligned:  # a bound that is a thousand times too wide would send every row to the float64 search
        assert error.max() > bound / 1000


def test_close_seconds_are_reranked_in_float64(path, monkeypatch):
    """With the float64 comparison of the best two taken away, close codes go wrong: it is what decides them."""
    from ztok_fast.ops.nearest import triton

    torch.manual_seed(3)
    base = torch.randn(1, 24)
    book = (base + 1e-5 * torch.randn(40, 24)).to(DEVICE)
    x = (base + 1e-5 * torch.randn(20, 24)).to(DEVICE)
    exact = torch.cdist(x.double(), book.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert torch.equal(triton.search(x, book[None], "l2", None, False).codes[:, 0].long(), exact)
    monkeypatch.setattr(triton, "error_bound", lambda *terms: 0.0)
    unranked = triton.search(x, book[None], "l2", None, False).codes[:, 0].long()
    assert not torch.equal(unranked, exact)


@pytest.mark.parametrize("rows", [1, 63, 129])
def test_the_path_and_the_parts_do_not_show(rows, monkeypatch):
    from ztok_fast.ops.nearest import triton

    x, codebook = torch.randn(rows, 20, device=DEVICE), torch.randn(2, 500, 20, device=DEVICE)
    found = []
    for full, parts in ((0, 1), (10**6, 1), (10**6, 5), (10**6, 32)):
        monkeypatch.setattr(triton, "FULL_BLOCKS", full)
        monkeypatch.setattr(triton, "MOST_PARTS", parts)
        found.append(triton.search(x, codebook, "l2", None, quantize=True))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)
