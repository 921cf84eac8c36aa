"""The compiled gradients through chosen codes: every metric, dtype and instruction set against float64, and no trace of
threads in a sum."""

from __future__ import annotations

import pytest
import torch

import ztok_fast
from tests.ops.tolerances import assert_close
from ztok_fast import native
from ztok_fast.ops.op import OPS

pytestmark = pytest.mark.skipif(not native.status("cpu").available, reason=native.status("cpu").reason)

HALVES = (torch.bfloat16, torch.float16)
METRICS = ("l2", "cosine", "dot")
# rows, codes, width, levels: no rows; vectors that are not full; enough work for five threads, which share the codes
# where a row has one cache line and otherwise its columns
SHAPES = [(0, 3, 4, 2), (1, 1, 1, 1), (9, 7, 45, 3), (60000, 5, 8, 2), (3000, 60, 100, 3)]


def gradients(op, backend, *args):
    with ztok_fast.backend(backend):
        return OPS[f"{op}_backward"](*args)


def case(rows, size, width, levels, dtype=torch.float32, book_dtype=torch.float32):
    """Rows, codebooks and codes chosen by lot; every level is left out of some rows, the middle ones too."""
    codes = torch.randint(-1, size, (rows, levels), dtype=torch.int32)
    return torch.randn(rows, width).to(dtype), torch.randn(levels, size, width).to(book_dtype), codes


def search_arguments(rows, books, codes, metric):
    return rows, books, codes.clamp(min=0), torch.randn(codes.shape), metric


def quantizer_arguments(rows, books, codes):
    return rows, books, codes, torch.randn(rows.shape).to(rows.dtype), torch.tensor(3.0), torch.tensor(-5.0)


def in_float64(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def all_arguments(rows, books, codes):
    for metric in METRICS:
        yield "codebook_assign", search_arguments(rows, books, codes, metric)
    yield "residual_quantize", quantizer_arguments(rows, books, codes)


def assert_matches_float64(op, args):
    for got, wanted, like in zip(
        gradients(op, "cpp", *args), gradients(op, "reference", *in_float64(args)), args[:2], strict=True
    ):
        assert got.dtype == like.dtype and got.shape == like.shape
        # Sums of many rows that cancel are rounded on the scale of what is added: the absolute part is of the largest.
        largest = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        assert_close(got.double() / largest, wanted / largest, like.dtype, scale=2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_on_every_instruction_set(shape):
    best = torch.ops.ztok.isa_native(-1)
    try:
        for number in range(best + 1):
            assert torch.ops.ztok.isa_native(number) == number
            for op, args in all_arguments(*case(*shape)):
                assert_matches_float64(op, args)
    finally:
        torch.ops.ztok.isa_native(best)


@pytest.mark.parametrize("book_dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_every_pair_of_dtypes(dtype, book_dtype):
    for op, args in all_arguments(*case(41, 13, 83, 3, dtype, book_dtype)):
        assert_matches_float64(op, args)


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_threads_do_not_show(shape):
    before = torch.get_num_threads()
    for op, args in all_arguments(*case(*shape)):
        results = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(gradients(op, "cpp", *args))
        finally:
            torch.set_num_threads(before)
        for result in results[1:]:
            for got, expected in zip(result, results[0], strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_or_have_no_direction(bad):
    rows, books, codes = case(9, 7, 5, 2)
    rows[4, 2] = bad
    rows[5] = 0
    books[0, codes[6, 0].clamp(min=0)] = 0
    for op, args in all_arguments(rows, books, codes):
        for got, wanted in zip(gradients(op, "cpp", *args), gradients(op, "reference", *args), strict=True):
            assert torch.equal(got.isnan(), wanted.isnan())
            torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_codes_that_do_not_exist_are_an_error():
    rows, books, codes = case(4, 3, 5, 2)
    for code in (-2, 3):
        codes[2, 1] = code
        with pytest.raises(RuntimeError, match=rf"codes: expected values in \[-1, 3\), got {code}"):
            gradients("residual_quantize", "cpp", *quantizer_arguments(rows, books, codes))


def test_float64_stays_with_the_reference():
    args = quantizer_arguments(*case(4, 3, 5, 2, book_dtype=torch.float64))
    with pytest.raises(ztok_fast.ops.BackendUnavailable, match="not torch.float64"):
        gradients("residual_quantize", "cpp", *args)
