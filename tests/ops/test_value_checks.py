"""Backends that look at values themselves refuse what the ops' own checks refuse, and nothing else."""

import pytest
import torch

import ztok_fast
from ztok_fast import native, ops
from ztok_fast.ops import checks
from ztok_fast.ops.backends import Backend
from ztok_fast.ops.nearest import reference
from ztok_fast.ops.op import OPS

pytestmark = pytest.mark.skipif(not native.status("cpu").available, reason="no compiled CPU library")

# rows that the C++ search takes one by one, unpacked; in one packed block; in many blocks shared by threads
ROWS = (0, 1, 3, 7, 700)
SIZE, WIDTH, LEVELS = 300, 40, 2
PLACES = ((0, 0, 0), (0, SIZE - 1, WIDTH - 1), (1, 0, WIDTH - 1), (1, 171, 17))


def codebooks(dtype=torch.float32):
    return torch.randn(LEVELS, SIZE, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_element_is_enough(rows, metric, dtype, bad):
    for level, code, column in PLACES:
        books = codebooks(dtype)
        books[level, code, column] = bad
        x = torch.randn(rows, WIDTH).to(dtype)
        with ztok_fast.backend("cpp"), pytest.raises(ValueError, match="codebook must be finite, got NaN or infinity"):
            ops.codebook_assign(x, books, metric)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("used", [None, 0, 1])
def test_one_bad_element_is_enough_in_a_level_that_no_row_uses(rows, used):
    books = codebooks()
    books[1, 250, 3] = torch.nan
    levels = None if used is None else torch.full((rows,), used)
    with ztok_fast.backend("cpp"), pytest.raises(ValueError, match="residual_quantize: codebooks must be finite"):
        ops.residual_quantize(torch.randn(rows, WIDTH), books, levels)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_rows_that_are_not_finite_hide_no_bad_code(rows, metric):
    books = codebooks()
    books[1, 9, 9] = torch.inf
    with ztok_fast.backend("cpp"), pytest.raises(ValueError, match="codebook must be finite"):
        ops.codebook_assign(torch.full((rows, WIDTH), torch.nan), books, metric)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_codes_whose_squares_overflow_are_finite(rows, metric):
    books = codebooks()
    books[0, 4] = torch.finfo(torch.float32).max
    books[1, 8, 1] = -1e30
    x = torch.randn(rows, WIDTH)
    with ztok_fast.backend("cpp"):
        found = ops.codebook_assign(x, books, metric)
    with ztok_fast.backend("reference"):
        expected = ops.codebook_assign(x, books, metric)
    assert torch.equal(found.codes, expected.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["fire", "stop"])
def test_mass_is_refused_where_the_reference_refuses_it(dtype, mode):
    largest = torch.finfo(dtype).max
    cu_seqlens = torch.tensor([0, 3])
    for value in (-0.0, 0.0, 0.7, 0.8, 1.0, -1e-3, largest, -largest, torch.inf, torch.nan):
        # 0.8 is rounded up in bfloat16: the threshold is compared as the mass is rounded
        mass = torch.tensor([0.1, value, 0.1], dtype=dtype)
        outcomes = []
        for backend in ("reference", "cpp"):
            try:
                with ztok_fast.backend(backend):
                    outcomes.append(ops.halting_units(mass, cu_seqlens, 0.8, mode).unit.tolist())
            except ValueError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1], value


def test_levels_of_a_sequence_without_rows_are_checked():
    arguments = {
        "hidden": torch.randn(3, 6), "mass": torch.full((3,), 0.5), "cu_seqlens": torch.tensor([0, 3, 3]),
        "end_weight": torch.randn(4, 6), "mean_weight": torch.randn(4, 6), "codebooks": torch.randn(2, 5, 4),
        "levels": torch.tensor([1, 7]),
    }  # fmt: skip
    for backend in ("reference", "cpp"):
        with ztok_fast.backend(backend), pytest.raises(ValueError, match=r"levels must be in \[0, 2\] .*, got 7"):
            ops.quantize_ragged(**arguments)


@pytest.mark.parametrize("checks_values", [False, True])
def test_the_check_runs_first_or_only_after_a_refusal(monkeypatch, checks_values):
    """A check that finds nothing leaves the backend's own error."""
    ran, op = [], OPS["codebook_assign"]

    def kernel(x, codebook, metric):
        ran.append("kernel")
        if metric == "dot":
            raise RuntimeError("refused")
        return reference.codebook_assign(x, codebook, metric)

    monkeypatch.setattr(op, "backends", (Backend("cpp", kernel, checks_values=checks_values),))
    monkeypatch.setattr(op, "_chosen", {})
    monkeypatch.setattr(op, "check_values", lambda *args: ran.append("check"))
    x, codebook = torch.randn(2, 4), torch.randn(3, 4)
    ops.codebook_assign(x, codebook)
    assert ran == (["kernel"] if checks_values else ["check", "kernel"])
    ran.clear()
    with pytest.raises(RuntimeError, match="refused"):
        ops.codebook_assign(x, codebook, "dot")
    assert ran == (["kernel", "check"] if checks_values else ["check", "kernel"])


def test_compiled_kernels_refuse_shapes_themselves(monkeypatch):
    """Of a call that is right the ops' own checks see nothing; they word the error of one that is wrong."""
    seen = []
    tensor = checks.Arguments.tensor
    monkeypatch.setattr(
        checks.Arguments, "tensor", lambda self, *args, **how: seen.append(1) or tensor(self, *args, **how)
    )
    x, weight, A, B = torch.randn(3, 4), torch.randn(5, 4), torch.randn(1, 2, 4), torch.randn(1, 5, 2)
    cu_seqlens = torch.tensor([0, 3])
    with ztok_fast.backend("cpp"):
        ops.codebook_assign(x, weight)
        ops.lora_linear(x, weight, None, A, B, torch.ones(1), None)
        ops.ragged_gather([x], [None], [cu_seqlens])
        assert not seen
        for wrong in (
            torch.randn(3, 7),
            torch.randn(3, 4, dtype=torch.float64),
            torch.ones(3, 4, dtype=torch.int64),
            [1],
        ):
            with pytest.raises(ValueError, match="codebook_assign: (x|codebook) must be"):
                ops.codebook_assign(wrong, weight.int() if torch.is_tensor(wrong) else weight)
            with pytest.raises(ValueError, match="lora_linear: (x|weight) must be"):
                ops.lora_linear(wrong, weight, None, A, B, torch.ones(1), None)
        with pytest.raises(ValueError, match="lora_linear: A must be of dtype float32, got float16"):
            ops.lora_linear(x, weight, None, A.half(), B.half(), torch.ones(1), None)
    assert seen


def test_good_input_is_looked_at_once(monkeypatch):
    def unwanted(*args):
        raise AssertionError("a pass over the values that the backend makes itself")

    for name in ("check_finite_values", "check_cu_seqlens_values"):
        monkeypatch.setattr(checks, name, unwanted)
    with ztok_fast.backend("cpp"):
        ops.codebook_assign(torch.randn(3, WIDTH), codebooks())
        ops.residual_quantize(torch.randn(3, WIDTH), codebooks())
        ops.halting_units(torch.rand(4), torch.tensor([0, 4]))
        ops.ragged_pack(torch.randn(1, 3, 2), torch.tensor([0, 2]), 2)
        ops.ragged_unpack(torch.randn(2, 2), torch.tensor([0, 2]), 3)
        ops.ragged_gather([torch.randn(5, 2)], [torch.tensor([4, 0])], [torch.tensor([0, 2])])
        ops.ragged_layout([torch.tensor([0, 2])], [2])


@pytest.mark.parametrize("exact", [True, False])
def test_offsets_short_of_the_rows(exact):
    """Only with `exact` False may rows be left over."""
    short, table = torch.tensor([0, 1]), torch.randn(3, 2)
    calls = (
        lambda: ops.ragged_pack(torch.randn(1, 3, 2), short, 2, exact),
        lambda: ops.ragged_unpack(table[:2], short, 3, 0.0, exact),
        lambda: ops.ragged_gather([table], [torch.tensor([2, 0])], [short], exact),
        lambda: ops.ragged_layout([short], [2], exact),
    )
    for call in calls:
        if exact:
            with pytest.raises(ValueError, match="must be 2 in its last element"):
                call()
        else:
            call()
