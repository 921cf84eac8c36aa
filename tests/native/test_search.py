"""What the compiled searches promise beyond the results: no trace of blocks, threads, instruction sets or batches in
the result, and no memory for scores."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

import ztok_fast
from ztok_fast import native, ops

pytestmark = pytest.mark.skipif(not native.status("cpu").available, reason=native.status("cpu").reason)

HALVES = (torch.bfloat16, torch.float16)
METRICS = ("l2", "cosine", "dot")
# rows, codes, width, levels: without packing (few rows, more of them if wide); codes in several blocks of 128, the last
# one not full; tiles of 6 rows and vectors of 8 or 16 elements not full; the width in parts of at most 256; rows in
# several blocks
SHAPES = [
    (1, 1, 1, 1),
    (3, 131, 45, 2),
    (7, 129, 300, 2),
    (11, 200, 40, 2),
    (50, 257, 700, 1),
    (701, 300, 40, 3),
    (400, 128, 1000, 1),
]


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def instruction_set(number: int):
    best = torch.ops.ztok.isa_native(-1)
    assert torch.ops.ztok.isa_native(number) == number
    try:
        yield
    finally:
        torch.ops.ztok.isa_native(best)


def instruction_sets() -> range:
    return range(torch.ops.ztok.isa_native(-1) + 1)


def case(rows, size, width, levels, dtype=torch.float32, book_dtype=None):
    """Random rows and codes with duplicates, near-ties, a huge row and one that is not finite among them."""
    x, codebook = torch.randn(rows, width), torch.randn(levels, size, width)
    codebook[:, size // 2 :][:, : size // 4] = codebook[:, : size // 4]
    if rows > 4:
        x[1] = codebook[0, -1]
        x[2] = (codebook[0, 0] + codebook[0, size // 3]) / 2
        x[3, 0] = torch.nan
        x[4] *= 1e4 if dtype in HALVES else 1e30
    return x.to(dtype), codebook.to(book_dtype or dtype)


def assert_same(got, expected):
    """Equal codes, and distances equal up to the last rounding."""
    assert torch.equal(got.codes, expected.codes)
    torch.testing.assert_close(got.distances, expected.distances, rtol=3e-7, atol=1e-6, equal_nan=True)


def by_reference(op, *args):
    with ztok_fast.backend("reference"):
        return op(*args)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_the_references_on_every_instruction_set(shape, metric):
    x, codebook = case(*shape)
    expected = by_reference(ops.codebook_assign, x, codebook, metric)
    results = []
    for number in instruction_sets():
        with instruction_set(number):
            results.append(ops.codebook_assign(x, codebook, metric))
        assert_same(results[-1], expected)
    for result in results:
        assert torch.equal(result.distances.nan_to_num(-1), results[0].distances.nan_to_num(-1))


@pytest.mark.parametrize("book_dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_every_pair_of_dtypes(dtype, book_dtype):
    for rows in (2, 41):
        x, codebook = case(rows, 131, 83, 2, dtype, book_dtype)
        for number in instruction_sets():
            with instruction_set(number):
                for metric in METRICS:
                    got = ops.codebook_assign(x, codebook, metric)
                    assert_same(got, by_reference(ops.codebook_assign, x, codebook, metric))


def test_a_float64_codebook_is_searched_in_float64():
    x, codebook = case(5, 20, 7, 1, book_dtype=torch.float64)
    assert ops.codebook_assign(x, codebook).distances.dtype == torch.float64
    with ztok_fast.backend("cpp"), pytest.raises(ops.BackendUnavailable, match="not torch.float64"):
        ops.codebook_assign(x, codebook)


@pytest.mark.parametrize("shape", [(3, 1000, 24, 2), (100, 1000, 24, 2), (701, 300, 40, 3)], ids=str)
def test_threads_do_not_show(shape):
    x, codebook = case(*shape)
    levels = torch.arange(shape[0]) % (shape[3] + 1)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append((*ops.codebook_assign(x, codebook), *ops.residual_quantize(x, codebook, levels)))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


def test_a_row_does_not_depend_on_the_others():
    x, codebook = case(701, 300, 40, 2)
    whole = ops.codebook_assign(x, codebook)
    for first, last in ((0, 1), (100, 107), (350, 701)):
        some = ops.codebook_assign(x[first:last], codebook)
        assert torch.equal(some.codes, whole.codes[first:last])
        assert torch.equal(some.distances.nan_to_num(-1), whole.distances[first:last].nan_to_num(-1))


def test_strided_and_unaligned_input():
    x, codebook = case(60, 150, 34, 2)
    expected = ops.codebook_assign(x, codebook)
    wide = torch.full((120, 37), torch.nan)
    wide[::2, 1:35] = x
    books = torch.full((2, 150, 35), torch.nan)
    books[..., 1:] = codebook
    for rows in (wide[::2, 1:35], x.T.contiguous().T):
        for table in (books[..., 1:], codebook.mT.contiguous().mT):
            got = ops.codebook_assign(rows, table)
            assert torch.equal(got.codes, expected.codes)
            assert torch.equal(got.distances.nan_to_num(-1), expected.distances.nan_to_num(-1))


@pytest.mark.parametrize("metric", METRICS)
def test_more_near_ties_than_are_kept(metric):
    """Thousands of codes a few units in the last place apart: the float64 answer is found among them all."""
    centre = torch.randn(20)
    codebook = centre * (1 + torch.randint(-3, 4, (1, 3000, 20)) * 2.0**-22)
    x = torch.cat([centre[None], torch.randn(10, 20), centre[None] * 3])
    expected = by_reference(ops.codebook_assign, x, codebook, metric)
    got = ops.codebook_assign(x, codebook, metric)
    chosen, best = (codebook[0].double()[result.codes[:, 0].long()] for result in (got, expected))
    rows = x.double()
    if metric == "l2":
        difference = (rows - chosen).square().sum(1) - (rows - best).square().sum(1)
        scale = (rows - best).square().sum(1)
    else:
        lengths = chosen.norm(dim=1), best.norm(dim=1)
        cosine = metric == "cosine"
        difference = (rows * best).sum(1) / (lengths[1] if cosine else 1)
        difference = difference - (rows * chosen).sum(1) / (lengths[0] if cosine else 1)
        scale = rows.norm(dim=1) * (1 if cosine else lengths[1])
    # what float64 itself leaves undecided
    assert (difference.abs() <= 1e-14 * scale).all()


def test_a_large_codebook():
    x, codebook = torch.randn(40, 16), torch.randn(1, 65536, 16)
    codebook[0, 60000] = codebook[0, 123]
    x[0] = codebook[0, 123]
    assert_same(ops.codebook_assign(x, codebook), by_reference(ops.codebook_assign, x, codebook))


@pytest.mark.parametrize("sampling", [(0.0, 1.0), (0.8, 1.0), (0.8, 0.9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_z_select_is_the_references_on_every_instruction_set_and_by_any_threads(dtype, sampling):
    hidden, rows = torch.randn(55, 100).to(dtype), (torch.randn(517, 100) / 5).to(dtype)
    rows[300:] = rows[:217]
    expected = by_reference(ops.z_select, hidden, rows, *sampling, 3)
    for number in instruction_sets():
        results = []
        with instruction_set(number):
            for count in (1, 3):
                with threads(count):
                    results.append(ops.z_select(hidden, rows, *sampling, 3))
            parts = [
                ops.z_select(hidden[i : i + 11], rows, *sampling, 3, torch.arange(i, i + 11)) for i in range(0, 55, 11)
            ]
        results.append(ops.Selection(*(torch.cat(outputs) for outputs in zip(*parts, strict=True))))
        assert torch.equal(results[0].codes, expected.codes)
        torch.testing.assert_close(results[0].log_probs, expected.log_probs, rtol=3e-6, atol=3e-6)
        for result in results[1:]:
            assert torch.equal(result.codes, results[0].codes)
            assert torch.equal(result.log_probs, results[0].log_probs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_z_select_with_numbers_too_large_for_float32_products(temperature):
    hidden, rows = torch.randn(4, 8) * 1e18, torch.randn(200, 8) * 1e18
    expected = by_reference(ops.z_select, hidden, rows, temperature)
    got = ops.z_select(hidden, rows, temperature)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.log_probs, expected.log_probs)
    # 1e20 * 1e20 is no float32: those logits are infinite
    overflowing = ops.z_select(hidden * 100, rows * 100, temperature)
    assert not overflowing.codes.any() and overflowing.log_probs.isnan().all()


def test_z_select_with_rows_that_are_not_finite():
    hidden, rows = torch.randn(5, 8), torch.randn(200, 8)
    rows[150, 3] = torch.inf
    got = ops.z_select(hidden, rows)
    assert not got.codes.any() and got.log_probs.isnan().all()


MEMORY = """
import resource
import torch
from ztok_fast import ops
x, codebook = torch.randn(60000, 16), torch.randn(1, 4096, 16)
ops.codebook_assign(x[:100], codebook)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.codebook_assign(x, codebook)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_grows_with_rows_and_codes_but_not_with_their_product():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    scores = 60000 * 4096 * 4
    assert int(run.stdout) * 1024 < scores / 50, f"{run.stdout} KiB"


@pytest.mark.parametrize("rows", [1, 3, 9, 10, 36, 37, 400])
@pytest.mark.parametrize("width", [20, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_shared_offsets_and_outliers(rows, width, dtype, metric):
    """Hidden states of language models: a few dimensions are large, and much alike in all rows and codes."""
    generator = torch.Generator().manual_seed(rows + width)
    shift = torch.zeros(width)
    shift[3], shift[width - 1] = 1000.0, -250.0
    x = torch.randn(rows, width, generator=generator) + shift
    books = (torch.randn(2, 200, width, generator=generator) + shift * torch.tensor([1.0, 0.0])[:, None, None]).to(
        dtype
    )
    with ztok_fast.backend("cpp"):
        found = ops.codebook_assign(x, books, metric)
    with ztok_fast.backend("reference"):
        expected = ops.codebook_assign(x, books, metric)
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.distances, expected.distances)
