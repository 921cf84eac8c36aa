"""The compiled ragged ops called directly: what they write and what they leave alone, threads, and refused arguments.

Their results are tested through the public ops, in tests/ops.
"""

from __future__ import annotations

import pytest
import torch

from ztok_fast import native

NATIVE = torch.ops.ztok
CANARY = 99
needs_cpu = pytest.mark.skipif(not native.status("cpu").available, reason=f"cpu: {native.status('cpu').reason}")
DEVICES = [pytest.param("cpu", marks=needs_cpu), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("cuda: no CUDA device")
        if not native.status("cuda").available:
            pytest.skip(f"cuda: {native.status('cuda').reason}")
    return request.param


def offsets(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device)


def between_canaries(shape: tuple[int, ...], dtype: torch.dtype, device: str, start: int):
    """A result tensor that begins at element `start` of a buffer full of canaries."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + start + 64,), CANARY, dtype=dtype, device=device)

    def intact() -> bool:
        return bool((buffer[:start] == CANARY).all() and (buffer[start + size :] == CANARY).all())

    return buffer[start : start + size].view(shape), intact


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("start", [16, 17, 23])
@pytest.mark.parametrize("width", [1, 24, 25, 800])
def test_results_are_written_and_nothing_else(device, dtype, start, width):
    lengths, capacity = [5, 0, 3], 10
    cu_seqlens = offsets(lengths, device)
    packed = torch.randint(0, 90, (capacity, width), device=device).to(dtype)
    padded, intact = between_canaries((3, 6, width), dtype, device, start)
    NATIVE.ragged_unpack_native_out(packed, cu_seqlens, 95.0, padded)
    assert not (padded == CANARY).any() and torch.equal(padded[2, :3], packed[5:8]) and intact()
    result, intact = between_canaries((capacity, width), dtype, device, start)
    NATIVE.ragged_pack_native_out(padded, cu_seqlens, result)
    assert torch.equal(result[:8], packed[:8]) and not result[8:].any() and intact()
    values, intact = between_canaries((2 * capacity, width), dtype, device, start)
    index = torch.tensor([9, 0, 0, 3, 9, 1, 2, 4, 70, -70], device=device)
    NATIVE.ragged_gather_native_out([packed, packed], [None, index], [cu_seqlens, cu_seqlens], values)
    assert torch.equal(values[:10], torch.cat([packed[:5], packed[index[:5]]])) and not values[16:].any() and intact()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("start", [16, 17])
@pytest.mark.parametrize("width", [1, 24, 25])
def test_sums_are_written_and_nothing_else(device, dtype, start, width):
    sums, intact = between_canaries((6, width), dtype, device, start)
    rows = torch.ones(5, width, dtype=dtype, device=device)
    NATIVE.ragged_scatter_add_native_out(rows, torch.tensor([1, 3, 1, 4, 1], device=device), sums)
    assert sums[:, 0].tolist() == [0, 3, 0, 1, 1, 0] and (sums == sums[:, :1]).all() and intact()


@needs_cpu
@pytest.mark.parametrize("width", [3, 576])
def test_results_do_not_depend_on_the_number_of_threads(width):
    lengths = [1500, 0, 1, 2, 700, 0, 1]
    cu_seqlens, total = offsets(lengths), sum(lengths)
    packed, index = torch.randn(total, width), torch.randint(0, 40, (total,))
    padded = torch.randn(7, 1500, width)

    def results():
        yield NATIVE.ragged_pack_native(padded, cu_seqlens, total)
        yield NATIVE.ragged_unpack_native(packed, cu_seqlens, 1500, 0.0)
        yield from NATIVE.ragged_layout_native([cu_seqlens, cu_seqlens], [total, total])
        yield from NATIVE.ragged_gather_native([packed, packed], [index, None], [cu_seqlens, cu_seqlens])
        grad = torch.cat([packed, padded.reshape(-1, width)[:total]])
        arguments = ([index, None], [cu_seqlens, cu_seqlens], [total, total], [True, True])
        yield from NATIVE.ragged_gather_backward_native(grad, *arguments)
        for num_rows in (40, 5000):
            yield NATIVE.ragged_scatter_add_native(packed, index, num_rows)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = list(results())
        for number in (2, 3, 5):
            torch.set_num_threads(number)
            assert all(torch.equal(a, b) for a, b in zip(results(), alone, strict=True))
    finally:
        torch.set_num_threads(threads)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sums_do_not_depend_on_the_instruction_set(dtype):
    rows, index = torch.randn(500, 77).to(dtype), torch.randint(0, 9, (500,))
    best = NATIVE.isa_native(-1)
    try:
        assert NATIVE.isa_native(0) == 0
        baseline = NATIVE.ragged_scatter_add_native(rows, index, 9)
        assert NATIVE.isa_native(best) == best
        assert torch.equal(NATIVE.ragged_scatter_add_native(rows, index, 9), baseline)
    finally:
        NATIVE.isa_native(best)


ROWS, CU = torch.zeros(4, 3), torch.tensor([0, 1, 4])


@needs_cpu
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NATIVE.ragged_unpack_native(ROWS, torch.tensor([0, 2, 5]), 3, 0.0), "at most 4 .*, got 5"),
        (lambda: NATIVE.ragged_unpack_native(ROWS, CU, 2, 0.0), "lengths of at most S = 2, got 3"),
        (lambda: NATIVE.ragged_unpack_native(ROWS, CU, -1, 0.0), "max_length: expected at least 0"),
        (lambda: NATIVE.ragged_unpack_native(ROWS.cfloat(), CU, 3, 0.0), "packed: expected a real or bool dtype"),
        (lambda: NATIVE.ragged_layout_native([CU], [4, 4]), r"cu_seqlens: expected 2 tensors .*, got 1"),
        (lambda: NATIVE.ragged_layout_native([CU], [-4]), "totals: expected at least 0, got -4"),
        (lambda: NATIVE.ragged_layout_native([CU, CU[:2]], [4, 4]), "cu_seqlens: expected 3 offsets"),
        (lambda: NATIVE.ragged_gather_native([ROWS], [CU.repeat(2)[:4]], [CU]), r"indices\[0\]: expected rows"),
        (lambda: NATIVE.ragged_gather_native([ROWS, ROWS[:, :2]], [None, None], [CU, CU]), "a width of 3, got 2"),
        (lambda: NATIVE.ragged_gather_native([ROWS, ROWS.int()], [None, None], [CU, CU]), "the dtype of the first one"),
        (lambda: NATIVE.ragged_gather_native([ROWS], [], [CU]), "indices: expected 1 entries, got 0"),
        (
            lambda: NATIVE.ragged_gather_backward_native(ROWS, [None], [CU], [5], [True]),
            "grad: expected 5 rows, got 4",
        ),
        (lambda: NATIVE.ragged_scatter_add_native(ROWS, torch.tensor([0, 1, 2, 3]), 3), r"in \[0, 3\), got 3"),
        (lambda: NATIVE.ragged_scatter_add_native(ROWS, torch.tensor([0, 1]), 3), "index: expected 4 values, got 2"),
        (lambda: NATIVE.ragged_scatter_add_native(ROWS.int(), torch.zeros(4).long(), 3), "a floating-point dtype"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
