from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.tolerances import assert_close
from ztok_fast import ops
from ztok_fast.ops.nearest import reference
from ztok_fast.ops.op import OPS

pytestmark = pytest.mark.op("codebook_assign")

METRICS = ("l2", "cosine", "dot")
EPS32 = float(np.finfo(np.float32).eps)
TINY32 = float(np.finfo(np.float32).tiny)


def all_distances(rows, book, metric):
    """Float64 distances [M, V] and how far float32 arithmetic on the same terms may put them apart."""
    rows, book = rows[:, None, :], book[None, :, :]
    width = rows.shape[-1]
    if metric == "l2":
        distances = np.square(rows - book).sum(-1)
        return distances, (width + 2) * EPS32 * distances + TINY32
    products = rows * book
    lengths = np.linalg.norm(rows, axis=-1) * np.linalg.norm(book, axis=-1)
    if metric == "dot":
        return -products.sum(-1), (width + 2) * EPS32 * lengths + TINY32
    cosines = np.divide(products.sum(-1), lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return 1 - cosines, np.full_like(lengths, (width + 6) * EPS32)


def check_against_float64(x, codebook, metric, codes, distances, exact):
    """Level by level: the chosen code is the nearest (of equals the first) or, unless `exact`, as good as it."""
    residual = x.float().cpu().numpy()
    books = codebook.float().cpu().numpy()
    codes, distances = codes.cpu().numpy(), distances.cpu().numpy()
    rows = np.arange(len(residual))
    for level, book in enumerate(books):
        expected, slack = all_distances(residual.astype(np.float64), book.astype(np.float64), metric)
        code = codes[:, level]
        if exact:
            np.testing.assert_array_equal(code, expected.argmin(1))
        excess = expected[rows, code] - expected.min(1)
        assert (excess <= 2 * slack[rows, code]).all(), f"level {level}: off by {excess.max()}"
        error = np.abs(distances[:, level] - expected[rows, code])
        assert (error <= 4 * slack[rows, code] + EPS32 * np.abs(expected[rows, code])).all()
        residual = residual - book[code]


def random_case(rows=37, size=50, width=12, levels=3, dtype=torch.float32):
    return torch.randn(rows, width).to(dtype), torch.randn(levels, size, width).to(dtype)


def duplicates():
    x, codebook = random_case()
    return x, codebook[:, torch.randint(0, 5, (50,))]


def all_equal():
    x, codebook = random_case()
    return x, codebook[:, :1].expand(-1, 50, -1).contiguous()


def near_ties():
    x, codebook = random_case(levels=1)
    codebook[0, 25:] = torch.nextafter(codebook[0, :25], torch.tensor(torch.inf))
    return x, codebook


def midpoints():
    x, codebook = random_case(levels=1)
    return (codebook[0, :20] + codebook[0, 20:40]) / 2, codebook


def huge_norms():
    x, codebook = random_case(levels=2)
    return x * 1e18, codebook * 1e18


def far_from_origin():
    x, codebook = random_case(levels=1)
    return x + 1e4, codebook + 1e4


def denormals():
    x, codebook = random_case(levels=2)
    return x * 1e-40, codebook * 1e-40


def zeros():
    return torch.zeros(5, 4), torch.zeros(2, 3, 4)


CASES = {
    "random": random_case,
    "wide": lambda: random_case(rows=5, size=300, width=130, levels=2),
    "one_code": lambda: random_case(size=1),
    "one_column": lambda: random_case(width=1),
    "one_row": lambda: random_case(rows=1),
    "bfloat16": lambda: random_case(dtype=torch.bfloat16),
    "float16": lambda: random_case(dtype=torch.float16),
    "duplicates": duplicates,
    "all_equal": all_equal,
    "near_ties": near_ties,
    "midpoints": midpoints,
    "huge_norms": huge_norms,
    "far_from_origin": far_from_origin,
    "denormals": denormals,
    "zeros": zeros,
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(backend, device, case, metric):
    x, codebook = (tensor.to(device) for tensor in CASES[case]())
    codes, distances = ops.codebook_assign(x, codebook, metric)
    assert codes.dtype == torch.int32 and distances.dtype == torch.float32
    generic = case in ("random", "wide", "one_code", "one_column", "one_row", "bfloat16", "float16")
    # midpoints, shifts by an ulp and the like leave float64 itself undecided; cosine in one column is all ties
    exact = backend == "reference" and generic and not (metric == "cosine" and case == "one_column")
    check_against_float64(x, codebook, metric, codes, distances, exact)


@pytest.mark.parametrize("case", ["duplicates", "all_equal", "zeros"])
@pytest.mark.parametrize("metric", METRICS)
def test_equal_codes_go_to_the_lowest_index(backend, device, case, metric):
    x, codebook = (tensor.to(device) for tensor in CASES[case]())
    codes, _ = ops.codebook_assign(x, codebook, metric)
    for level, book in enumerate(codebook):
        first_equal = (book[:, None] == book[None]).all(-1).int().argmax(1)
        chosen = codes[:, level].long()
        assert torch.equal(first_equal[chosen], chosen)


@pytest.mark.parametrize("scale", [1e3, 1e12, 1e16, 1e20, 1e36])
@pytest.mark.parametrize("rows", [1, 9, 60])
def test_the_nearest_code_of_rows_far_longer_than_the_codes(backend, device, rows, scale):
    """Codes in pairs a few units in the last place apart, decided by rational numbers: in float64 the squared distances
    of such a row say nothing of the code."""
    for _ in range(4):
        codebook = torch.randn(40, 9)
        codebook[20:] = codebook[:20] * (1 + torch.randint(-3, 4, (20, 9)) * 2.0**-21)
        x = torch.randn(rows, 9) * scale
        codes = codebook.tolist()
        found = ops.codebook_assign(x.to(device), codebook.to(device)).codes.tolist()
        for row, code in list(zip(x.tolist(), found))[:3]:
            scores = [sum(Fraction(c) * (Fraction(c) - 2 * Fraction(a)) for a, c in zip(row, own)) for own in codes]
            assert code == scores.index(min(scores))


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 20),
    size=st.integers(1, 12),
    width=st.integers(1, 6),
    levels=st.integers(1, 3),
    metric=st.sampled_from(["l2", "dot"]),
)
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_small_integers_are_exact(backend, device, seed, rows, size, width, levels, metric):
    """With small integers every sum is exact in float32, so ties are true ties and the answer is unique."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (rows, width), generator=generator).float()
    codebook = torch.randint(-2, 3, (levels, size, width), generator=generator).float()
    codes, distances = ops.codebook_assign(x.to(device), codebook.to(device), metric)
    residual = x.double().numpy()
    for level in range(levels):
        expected, _ = all_distances(residual, codebook[level].double().numpy(), metric)
        np.testing.assert_array_equal(codes[:, level].cpu().numpy(), expected.argmin(1))
        np.testing.assert_array_equal(distances[:, level].cpu().numpy(), expected.min(1, initial=np.inf))
        residual = residual - codebook[level].double().numpy()[expected.argmin(1)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite(backend, device, metric, bad):
    x, codebook = (tensor.to(device) for tensor in random_case())
    clean_codes, clean_distances = ops.codebook_assign(x, codebook, metric)
    x[3, 2] = bad
    codes, distances = ops.codebook_assign(x, codebook, metric)
    assert (codes[3] == 0).all() and distances[3].isnan().all()
    others = torch.arange(len(x), device=device) != 3
    assert torch.equal(codes[others], clean_codes[others])
    assert torch.equal(distances[others], clean_distances[others])


def test_one_codebook_without_levels(backend, device):
    x, codebook = (tensor.to(device) for tensor in random_case(levels=1))
    codes, distances = ops.codebook_assign(x, codebook[0])
    assert codes.shape == distances.shape == (37,)
    with_levels = ops.codebook_assign(x, codebook)
    assert torch.equal(codes, with_levels.codes[:, 0])
    assert torch.equal(distances, with_levels.distances[:, 0])


def test_no_rows(backend, device):
    codes, distances = ops.codebook_assign(torch.empty(0, 4, device=device), torch.ones(2, 3, 4, device=device))
    assert codes.shape == distances.shape == (0, 2)


def test_repeats_bitwise_whatever_else_is_in_the_batch(backend, device):
    x, codebook = (tensor.to(device) for tensor in random_case(rows=19, size=300, width=33))
    first, second = ops.codebook_assign(x, codebook), ops.codebook_assign(x, codebook)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.distances, second.distances)
    for row in range(0, 19, 6):
        alone = ops.codebook_assign(x[row : row + 1], codebook)
        assert torch.equal(alone.codes, first.codes[row : row + 1])


def test_blocks_do_not_show(backend, device, monkeypatch):
    if backend != "reference":
        pytest.skip("the block size is the reference's")
    for case in ("random", "duplicates", "all_equal"):
        x, codebook = (tensor.to(device) for tensor in CASES[case]())
        whole = ops.codebook_assign(x, codebook)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_BLOCK_ELEMENTS", 37)
            blocks = ops.codebook_assign(x, codebook)
        assert torch.equal(whole.codes, blocks.codes) and torch.equal(whole.distances, blocks.distances)


def differentiable_inputs(device, dtype=torch.float64):
    x = torch.randn(6, 4, dtype=dtype, device=device, requires_grad=True)
    codebook = torch.randn(2, 5, 4, dtype=dtype, device=device, requires_grad=True)
    return x, codebook


@pytest.mark.dtype(torch.float64)
@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(backend, device, metric):
    inputs = differentiable_inputs(device)
    assert torch.autograd.gradcheck(lambda x, c: ops.codebook_assign(x, c, metric).distances, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_gradients_match_float64(backend, device, metric, dtype):
    x, codebook = (tensor.to(device).requires_grad_() for tensor in random_case(rows=7, size=9, dtype=dtype))
    codes, distances = ops.codebook_assign(x, codebook, metric)
    distances.sum().backward()
    x64, codebook64 = x.detach().double().requires_grad_(), codebook.detach().double().requires_grad_()
    residual, total = x64, 0.0
    for level in range(codebook.shape[0]):
        chosen = codebook64[level][codes[:, level].long()]
        if metric == "l2":
            total = total + (residual - chosen).square().sum()
        elif metric == "dot":
            total = total - (residual * chosen).sum()
        else:
            total = total - torch.cosine_similarity(residual, chosen).sum()
        residual = residual - chosen
    total.backward()
    assert_close(x.grad, x64.grad, dtype, scale=5)
    assert_close(codebook.grad, codebook64.grad, dtype, scale=5)


def test_compiles_in_full_without_recompiling_for_another_number_of_rows(backend, device):
    counter = CompileCounter()
    compiled = torch.compile(lambda x, c: ops.codebook_assign(x, c).distances, fullgraph=True, backend=counter)
    codebook = torch.randn(2, 8, 4, device=device)
    for rows in (7, 12, 30):
        x = torch.randn(rows, 4, device=device)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x, codebook), ops.codebook_assign(x, codebook).distances)
    assert counter.frame_count == 1


GOOD = {"x": torch.zeros(3, 4), "codebook": torch.zeros(2, 5, 4), "metric": "l2"}


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("x", torch.zeros(4), r"x must be a tensor \[M, d\], got float32 \[4\]"),
        ("x", [[0.0]], r"x must be a tensor \[M, d\], got list"),
        ("x", torch.zeros(3, 4, dtype=torch.int64), "x must be of dtype .*, got int64"),
        ("codebook", torch.zeros(4), r"codebook must be a tensor \[V, d\] or \[L, V, d\]"),
        ("codebook", torch.zeros(5, 4, dtype=torch.int32), "codebook must be of dtype"),
        ("codebook", torch.zeros(5, 3), r"codebook must be of size 4 in dimension 1 .* \(d of x\)"),
        ("codebook", torch.zeros(0, 4), "codebook must be not empty"),
        ("codebook", torch.zeros(0, 5, 4), "codebook must be not empty"),
        ("codebook", torch.full((5, 4), torch.nan), "codebook must be finite"),
        ("codebook", torch.zeros(5, 4, device="meta"), "codebook must be on the device of x"),
        ("metric", "l1", "metric must be one of 'l2', 'cosine', 'dot', got 'l1'"),
    ],
)
def test_bad_input(backend, device, argument, value, message):
    arguments = GOOD | {argument: value}
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        for name, value in arguments.items()
    }
    if message.endswith("finite") and device != "cpu":
        pytest.skip("values are not checked there without ZTOK_DEBUG_CHECKS")
    with pytest.raises(ValueError, match=f"codebook_assign: {message}"):
        ops.codebook_assign(**arguments)


class LargestTensor(TorchDispatchMode):
    """Size of the largest tensor that any call made, in numbers of four bytes (the interpreter copies bytes)."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel() * tensor.element_size() // 4)
        return result


def test_no_tensor_of_the_size_of_all_scores(backend, device, monkeypatch):
    """Neither M x V nor M x V x L; `tests/native/test_search.py` measures what the C++ library allocates itself."""
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 2000)
    rows, size, width, levels = 500, 400, 3, 2
    x, codebook = torch.randn(rows, width, device=device), torch.randn(levels, size, width, device=device)
    op = OPS["codebook_assign"]
    chosen = op.choose((x, codebook, "l2"), backend)
    with LargestTensor() as seen:
        op.run(chosen, (x, codebook, "l2"))
    assert 0 < seen.elements <= 8 * (rows + levels * size) * width < rows * size
