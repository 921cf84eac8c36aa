"""Which launches the Triton residual search is made of, and that they leave out what no row asks for."""

import pytest
import torch

from tests.ops.conftest import missing
from tests.ops.test_nearest import check_against_float64
from ztok_fast.ops.quantize import reference
from ztok_fast.ops.triton_launch import Tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MISSING = missing("codebook_assign", "triton", DEVICE)

pytestmark = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that a search launches, in their order."""
    seen = []
    launch = Tiles.__getitem__

    def recorded(tiles, grid):
        seen.append(tiles.kernel.__name__.removesuffix("_kernel"))
        return launch(tiles, grid)

    monkeypatch.setattr(Tiles, "__getitem__", recorded)
    return seen


def use_path(monkeypatch, path):
    """Force all levels in one launch, or two launches per level with the codebook in several parts."""
    from ztok_fast.ops.nearest import triton

    monkeypatch.setattr(triton, "FULL_BLOCKS", 0 if path == "one launch" else 10**6)


def wide_case(kind):
    """Rows wider than any tile, [M, 300] float32, and three codebooks [3, 90, 300]."""
    codebooks = torch.randn(3, 90, 300)
    if kind == "near ties":  # every code of the first level has a neighbour an ulp away
        codebooks[0, 45:] = torch.nextafter(codebooks[0, :45], torch.tensor(torch.inf))
    x = torch.randn(70, 300)
    if kind == "not finite":
        x[3], x[17, 5], x[64, 299] = torch.nan, torch.inf, -torch.inf
    return x.to(DEVICE), codebooks.to(DEVICE)


@pytest.mark.parametrize("width", [16, 257, 300])
def test_many_rows_of_any_width_take_one_launch(launches, monkeypatch, width):
    from ztok_fast.ops.nearest import triton

    use_path(monkeypatch, "one launch")
    x, codebooks = torch.randn(70, width, device=DEVICE), torch.randn(3, 40, width, device=DEVICE)
    found = triton.search(x, codebooks, "l2", None, quantize=True)
    assert launches == ["prepare_codes", "residual_search", "mean_error"]
    check_against_float64(x, codebooks, "l2", found.codes, found.distances, exact=True)


def test_few_rows_take_two_launches_per_level(launches, monkeypatch):
    from ztok_fast.ops.nearest import triton

    use_path(monkeypatch, "by level")
    x, codebooks = torch.randn(9, 20, device=DEVICE), torch.randn(3, 400, 20, device=DEVICE)
    triton.search(x, codebooks, "l2", None, quantize=True)
    assert launches == ["prepare_codes", *["scan", "rerank"] * 3, "sum_codes", "mean_error"]


@pytest.mark.parametrize(
    ("metric", "kind"), [("l2", "near ties"), ("l2", "not finite"), ("cosine", "plain"), ("dot", "not finite")]
)
def test_wide_rows_of_several_levels(monkeypatch, kind, metric):
    """Both paths give the same bits, and those of float64."""
    from ztok_fast.ops.nearest import triton

    x, codebooks = wide_case(kind)
    found = []
    for path in ("one launch", "by level"):
        use_path(monkeypatch, path)
        found.append(triton.search(x, codebooks, metric, None, quantize=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    finite = x.isfinite().all(1)
    assert found[0].codes[~finite].eq(0).all() and found[0].distances[~finite].isnan().all()
    one = found[0].codes[finite], found[0].distances[finite]
    check_against_float64(x[finite], codebooks, metric, *one, exact=kind != "near ties")


@pytest.mark.parametrize("kind", ["plain", "near ties", "not finite"])
@pytest.mark.parametrize("path", ["one launch", "by level"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_levels_of_wide_rows(monkeypatch, path, kind, dtype):
    """Codes, counts and sums of rows that use some of the levels are those of the reference."""
    from ztok_fast.ops.nearest import triton

    use_path(monkeypatch, path)
    x, codebooks = (tensor.to(dtype) for tensor in wide_case(kind))
    levels = torch.randint(0, 4, (70,), dtype=torch.int32).to(DEVICE)
    levels[60:] = 0
    found = triton.search(x, codebooks, "l2", levels, quantize=True)
    quantized, _, _, codes, usage = reference.residual_quantize(x, codebooks, levels)
    if kind == "near ties" and dtype == torch.bfloat16:  # the neighbours have become one code: the lowest is taken
        assert (found.codes[:, 0] < 45).all()
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.usage, usage)
    assert torch.equal(found.quantized, quantized)
    unused = torch.arange(3, device=DEVICE) >= levels[:, None]
    assert found.distances[unused].eq(0).all()


def poisoned_scores(parts, source):
    """Scores that would win, of a code that would be found at once, wherever the scan writes none."""
    rows = source.shape[0]
    scores = torch.full((parts, 3, rows), -torch.inf, device=source.device)
    return scores, torch.full((parts, 2, rows), -(2**30), dtype=torch.int32, device=source.device)


def test_blocks_without_a_level_are_not_scanned(monkeypatch):
    """By level: the scan writes no score for blocks that use no level, and what is there is not read."""
    from ztok_fast.ops.nearest import triton

    use_path(monkeypatch, "by level")
    x, codebooks = torch.randn(600, 20, device=DEVICE), torch.randn(2, 300, 20, device=DEVICE)
    levels = torch.zeros(600, dtype=torch.int32, device=DEVICE)
    levels[:100] = 2
    levels[130:135] = 1
    block = triton.SCAN.BM
    expected = triton.search(x, codebooks, "l2", levels, quantize=True)
    kept = []

    def poisoned(parts, source):
        kept.append(poisoned_scores(parts, source))
        return kept[-1]

    monkeypatch.setattr(triton, "_part_scores", poisoned)
    found = triton.search(x, codebooks, "l2", levels, quantize=True)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    scores, indices = kept[0]
    searched = -(-135 // block) * block
    assert scores[..., :searched].isfinite().all() and (indices[..., :searched] >= 0).all()
    assert searched < 600
    assert (scores[..., searched:] == -torch.inf).all() and (indices[..., searched:] < 0).all()
    assert (found.codes[135:] == -1).all() and (found.distances[135:] == 0).all() and (found.quantized[135:] == 0).all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts calls in Triton's interpreter")
@pytest.mark.parametrize(("path", "width"), [("one launch", 20), ("one launch", 300), ("by level", 20)])
def test_searches_are_counted(monkeypatch, path, width):
    """A block of rows is searched as often as its deepest row has levels."""
    from ztok_fast.ops.nearest import triton
    from ztok_fast.ops.nearest import triton_kernels as kernels

    use_path(monkeypatch, path)
    x, codebooks = torch.randn(600, width), torch.randn(3, 20, width)
    levels = torch.zeros(600, dtype=torch.int32)
    levels[0], levels[599] = 3, 1
    reranked = []
    rerank = kernels.rerank

    def counted(*arguments):
        reranked.append(int(arguments[1].handle.data[0]))
        return rerank(*arguments)

    monkeypatch.setattr(kernels, "rerank", counted)
    found = triton.search(x, codebooks, "l2", levels, quantize=True)
    assert len(reranked) == 4 and reranked.count(0) == 3
    assert (found.codes >= 0).sum() == 4
