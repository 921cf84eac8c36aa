"""The engine's linear layers, bit for bit: against the second implementation of docs/determinism.md in numpy, and
across instruction sets, threads, batches and backends."""

import numpy as np
import pytest
import torch

import ztok_fast
from tests.engine import oracle
from ztok_fast import native, ops
from ztok_fast.ops.int8 import reference
from ztok_fast.ops.int8.int8_linear import special_rows

ROWS = (*range(1, 27), 31, 64, 100, 131, 132, 133, 265, 1000, 4096)
WIDTH, OUT = 100, 136 + 7  # neither a multiple of 64 nor of 16; more than one block of columns

needs_cpu = pytest.mark.skipif(not native.status("cpu").available, reason="no compiled CPU library")


def rows_of(count, width=WIDTH, seed=0):
    return special_rows(torch.Generator().manual_seed(seed), count, width)


def weight_of(out=OUT, width=WIDTH, seed=1):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * width**-0.5


def same_bits(got, wanted):
    """NaN equal to NaN, 0 not equal to -0."""
    got, wanted = torch.as_tensor(got), torch.as_tensor(wanted)
    assert got.shape == wanted.shape and got.dtype == wanted.dtype == torch.float32
    different = (got.view(torch.int32) != wanted.view(torch.int32)) & ~(got.isnan() & wanted.isnan())
    assert not different.any(), f"{int(different.sum())} of {different.numel()} differ"


def with_oracle(function, *args):
    with np.errstate(all="ignore"):
        return torch.from_numpy(function(*(np.asarray(a) if torch.is_tensor(a) else a for a in args)))


def int8_oracle(x, weight, bias=None):
    q, scales = oracle.quantise(weight)
    return with_oracle(oracle.int8_linear, x, q, scales, bias)


@pytest.fixture(params=range(6))
def int8_isa(request):
    """Each variant of the int8 products that this processor has."""
    if torch.ops.ztok.int8_isa_native(request.param) != request.param:
        torch.ops.ztok.int8_isa_native(-1)
        pytest.skip("not available here")
    yield request.param
    torch.ops.ztok.int8_isa_native(-1)


@pytest.fixture(params=range(3), ids=("baseline", "avx2", "avx512"))
def isa(request):
    best = torch.ops.ztok.isa_native(-1)
    if torch.ops.ztok.isa_native(request.param) != request.param:
        pytest.skip("not available here")
    yield request.param
    torch.ops.ztok.isa_native(best)


@pytest.fixture(params=(1, 2))
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# --- quantisation


@pytest.mark.parametrize("width", [1, 3, 15, 16, 64, 65, 200, 1536])
def test_rows_are_quantised_as_specified(width):
    x = rows_of(64, width)
    q, scales = reference.quantize_rows(x)
    with np.errstate(all="ignore"):
        wanted, wanted_scales = oracle.quantise(x.numpy())
    assert np.array_equal(q.numpy(), wanted)
    same_bits(scales, torch.from_numpy(wanted_scales))


def test_ties_go_to_the_even_integer():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5]])
    assert reference.quantize_rows(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -126, 126]]
    panels, scales = ops.int8_pack(torch.eye(8))
    y = ops.int8_linear(x, panels, scales, 8)
    same_bits(y, int8_oracle(x, torch.eye(8)))


def test_thresholds_of_a_row():
    at = 2.0**-100
    x = torch.tensor([[at, 0.0], [np.nextafter(np.float32(at), np.float32(0)), 0.0], [3.4e38, 1.0], [-0.0, 0.0]])
    q, scales = reference.quantize_rows(x)
    assert q.tolist() == [[127, 0], [0, 0], [127, 0], [0, 0]]
    assert scales[1] == scales[3] == 0 and scales[0] == np.float32(at) / np.float32(127)


@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (3, 20, 70)])
def test_panels_hold_the_integers_where_the_layout_says(shape):
    weight = torch.randn(shape)
    panels, scales = ops.int8_pack(weight)
    q, wanted_scales = oracle.quantise(weight.numpy())
    *lead, out, width = shape
    for index in np.ndindex(*lead, out, width):
        *first, channel, k = index
        stored = panels[(*first, channel // 16, k // 4, channel % 16, k % 4)]
        assert int(stored) - 128 == q[index]
    same_bits(scales[..., :out], torch.from_numpy(wanted_scales))
    assert int((panels != 128).sum()) == int((q != 0).sum()) and not scales[..., out:].any()


# --- int8_linear


@pytest.mark.op("int8_linear")
@pytest.mark.parametrize("bias", [False, True])
def test_int8_linear_is_the_specification(backend, device, bias):
    x, weight = rows_of(45), weight_of()
    offset = torch.randn(OUT) if bias else None
    panels, scales = ops.int8_pack(weight.to(device))
    y = ops.int8_linear(x.to(device), panels, scales, OUT, None if offset is None else offset.to(device))
    same_bits(y.cpu(), int8_oracle(x, weight, None if offset is None else offset.numpy()))


@needs_cpu
def test_any_variant_threads_and_rows(int8_isa, threads):
    x = rows_of(max(ROWS))
    packed = ops.int8_pack(weight_of())
    wanted = reference.int8_linear(x, packed.panels[None], packed.scales[None], OUT, None, None, None)
    for rows in ROWS:
        for first in {0, (max(ROWS) - rows) // 3}:
            with ztok_fast.backend("cpp"):
                y = ops.int8_linear(x[first : first + rows], *packed, OUT)
            same_bits(y, wanted[first : first + rows])


@needs_cpu
@pytest.mark.parametrize("width", [1, 63, 64, 65, 576, 1536])
def test_any_instruction_set_and_depth(isa, width):
    x, weight = rows_of(37, width), weight_of(48, width)
    with ztok_fast.backend("cpp"):
        y = ops.int8_linear(x, *ops.int8_pack(weight), 48)
    same_bits(y, int8_oracle(x, weight))


@needs_cpu
def test_the_variant_follows_the_instruction_set(isa):
    assert torch.ops.ztok.int8_isa_native(-1) in {0: (0,), 1: (1, 2), 2: (3, 4, 5)}[isa]


@pytest.mark.op("int8_linear")
@pytest.mark.parametrize("by_row", [False, True])
def test_each_row_has_the_weight_of_its_adapter(backend, device, by_row):
    x, weights = rows_of(40), torch.stack([weight_of(20, seed=seed) for seed in range(4)])
    weights[2] = torch.nan  # no row uses it
    packed = [part.to(device) for part in ops.int8_pack(weights)]
    if by_row:
        adapters, cu_seqlens = torch.tensor([0, 3, 1, 1, 3] * 8, dtype=torch.int32), None
        of_rows = adapters
    else:
        adapters, cu_seqlens = torch.tensor([3, 0, 3, 1], dtype=torch.int32), torch.tensor([0, 17, 17, 20, 40])
        of_rows = adapters.repeat_interleave(cu_seqlens.diff())
        cu_seqlens = cu_seqlens.to(device)
    y = ops.int8_linear(x.to(device), *packed, 20, None, adapters.to(device), cu_seqlens).cpu()
    for adapter in (0, 1, 3):
        own = of_rows == adapter
        same_bits(y[own], int8_oracle(x[own], weights[adapter]))


@pytest.mark.op("int8_linear")
def test_rows_and_panels_that_are_not_contiguous(backend, device):
    wide, weight = rows_of(30, 2 * WIDTH).to(device), weight_of(20).to(device)
    panels, scales = ops.int8_pack(weight)
    strided = torch.stack([panels, panels], -1)[..., 0]
    for x in (wide[:, ::2], wide[::2, :WIDTH], wide[:, :30].T.contiguous().T):
        own = (panels, scales) if x.shape[1] == WIDTH else ops.int8_pack(weight[:, : x.shape[1]])
        same_bits(ops.int8_linear(x, *own, 20).cpu(), int8_oracle(x.cpu(), weight[:, : x.shape[1]].cpu()))
    same_bits(ops.int8_linear(wide[:, ::2], strided, scales, 20).cpu(), int8_oracle(wide[:, ::2].cpu(), weight.cpu()))


# --- ordered_linear and fold_lora


@pytest.mark.op("ordered_linear")
@pytest.mark.parametrize("bias", [False, True])
def test_ordered_linear_is_the_specification(backend, device, bias):
    x, weight = rows_of(45, 70), weight_of(40, 70)
    weight[3] *= 1e-38  # products below the normal numbers
    offset = torch.randn(40) if bias else None
    y = ops.ordered_linear(
        x.to(device), ops.ordered_pack(weight.to(device)), 40, None if offset is None else offset.to(device)
    )
    same_bits(y.cpu(), with_oracle(oracle.ordered_linear, x, weight, None if offset is None else offset.numpy()))


@needs_cpu
def test_order_for_any_instruction_set_threads_and_rows(isa, threads):
    count = ROWS if isa else [rows for rows in ROWS if rows <= 132]
    x, weight = rows_of(max(count), 33), weight_of(OUT, 33)
    wanted = with_oracle(oracle.ordered_linear, x, weight)
    panels = ops.ordered_pack(weight)
    for rows in count:
        with ztok_fast.backend("cpp"):
            same_bits(ops.ordered_linear(x[-rows:], panels, OUT), wanted[-rows:])


@needs_cpu
@pytest.mark.parametrize("panels", range(1, 18))
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 12, 13])
def test_order_for_any_number_of_panels(rows, panels):
    x, weight = rows_of(rows, 20), weight_of(16 * panels, 20)
    with ztok_fast.backend("cpp"):
        y = ops.ordered_linear(x, ops.ordered_pack(weight), 16 * panels)
    same_bits(y, with_oracle(oracle.ordered_linear, x, weight))


@needs_cpu
def test_results_do_not_depend_on_the_mode_of_the_thread():
    x, weight = torch.randn(8, 40) * 1e-20, torch.randn(24, 40) * 1e-22
    packed, ordered = ops.int8_pack(weight), ops.ordered_pack(weight)

    def results():
        with ztok_fast.backend("cpp"):
            return ops.int8_linear(x, *packed, 24), ops.ordered_linear(x, ordered, 24)

    wanted = results()
    assert all(0 < y.abs()[y != 0].min() < torch.finfo(torch.float32).tiny for y in wanted)
    assert torch.set_flush_denormal(True)
    try:
        got = results()
        assert (torch.tensor([1e-39]) * 1.0).item() == 0  # the mode of the thread is as it was
    finally:
        torch.set_flush_denormal(False)
    for y, other in zip(got, wanted, strict=True):
        same_bits(y, other)


@pytest.mark.op("fold_lora")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_lora_is_the_specification(backend, device, dtype):
    weight, A, B = torch.randn(35, 50).to(dtype), torch.randn(7, 50), torch.randn(35, 7).to(dtype)
    folded = ops.fold_lora(weight.to(device), A.to(device), B.to(device), 0.3)
    same_bits(folded.cpu(), with_oracle(oracle.fold_lora, weight.float(), A, B.float(), 0.3))


# --- errors


def arguments(**changes):
    packed = ops.int8_pack(torch.randn(2, 20, 8))
    given = {
        "x": torch.randn(5, 8),
        "panels": packed.panels,
        "scales": packed.scales,
        "out_features": 20,
        "adapters": torch.tensor([0, 1], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 2, 5]),
    }
    return {**given, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(5, 8).double()}, "x must be of dtype float32"),
        ({"x": torch.randn(5, 65)}, "panels must be of size 32 in dimension 2"),
        ({"panels": torch.zeros(2, 2, 16, 16, 4)}, "panels must be of dtype uint8"),
        ({"scales": torch.zeros(32)}, "scales must be with a dimension of adapters"),
        ({"scales": torch.zeros(2, 20)}, "scales must be of size 32 in dimension 1"),
        ({"out_features": 33}, "out_features must be above 16 and at most 32"),
        ({"out_features": 16}, "out_features must be above 16 and at most 32"),
        ({"bias": torch.zeros(32)}, "bias must be of size 20"),
        ({"adapters": None}, "adapters must be an int32 tensor, because panels holds 2 adapters"),
        ({"adapters": torch.tensor([0, 1])}, "adapters must be of dtype int32"),
        ({"adapters": torch.tensor([0, 2], dtype=torch.int32)}, r"adapters must be in \[0, 2\), got 2"),
        ({"adapters": torch.tensor([-1, 0], dtype=torch.int32)}, r"adapters must be in \[0, 2\), got -1"),
        ({"cu_seqlens": None}, "adapters must be of size 5"),
        ({"cu_seqlens": torch.tensor([0, 3, 4])}, "cu_seqlens must be 5 in its last element"),
        ({"cu_seqlens": torch.tensor([0, 7, 5])}, "cu_seqlens must be non-decreasing"),
    ],
)
def test_int8_linear_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=f"int8_linear: {message}"):
        ops.int8_linear(**arguments(**changes))


def test_the_others_say_what_is_wrong():
    with pytest.raises(ValueError, match="int8_pack: weight must be of dtype float16, bfloat16, float32"):
        ops.int8_pack(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="int8_pack: weight must be of at most 65,536 inputs"):
        ops.int8_pack(torch.zeros(1, 65537))
    with pytest.raises(ValueError, match="ordered_pack: weight must be not empty"):
        ops.ordered_pack(torch.zeros(0, 2))
    panels = ops.ordered_pack(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="ordered_linear: panels must be of size 5 in dimension 1"):
        ops.ordered_linear(torch.zeros(1, 5), panels, 3)
    with pytest.raises(ValueError, match="ordered_linear: out_features must be an integer of at least 0"):
        ops.ordered_linear(torch.zeros(1, 4), panels, 3.0)
    with pytest.raises(ValueError, match="fold_lora: B must be of size 2 in dimension 1"):
        ops.fold_lora(torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(3, 3), 1.0)
