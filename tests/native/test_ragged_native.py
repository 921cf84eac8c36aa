"""The compiled ragged ops of the CPU called directly: threads, instruction sets, and refused arguments.

Their results are tested through the public ops, in tests/ops.
"""

from __future__ import annotations

import pytest
import torch

from ztok_fast import native

NATIVE = torch.ops.ztok
needs_cpu = pytest.mark.skipif(not native.status("cpu").available, reason=f"cpu: {native.status('cpu').reason}")


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@needs_cpu
@pytest.mark.parametrize("width", [3, 576])
def test_results_do_not_depend_on_the_number_of_threads(width):
    lengths = [1500, 0, 1, 2, 700, 0, 1]
    cu_seqlens, total = offsets(lengths), sum(lengths)
    packed, index = torch.randn(total, width), torch.randint(0, 40, (total,))
    padded = torch.randn(7, 1500, width)

    def results():
        yield NATIVE.ragged_pack(padded, cu_seqlens, total, True)
        yield NATIVE.ragged_unpack(packed, cu_seqlens, 1500, 0.0, True)
        yield from NATIVE.ragged_layout([cu_seqlens, cu_seqlens], [total, total], True)
        yield from NATIVE.ragged_gather([packed, packed], [index, None], [cu_seqlens, cu_seqlens], True)
        grad = torch.cat([packed, padded.reshape(-1, width)[:total]])
        arguments = ([index, None], [cu_seqlens, cu_seqlens], [total, total], [True, True])
        yield from NATIVE.ragged_gather_backward(grad, *arguments)
        for num_rows in (40, 5000):
            yield NATIVE.ragged_scatter_add(packed, index, num_rows)

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
        baseline = NATIVE.ragged_scatter_add(rows, index, 9)
        assert NATIVE.isa_native(best) == best
        assert torch.equal(NATIVE.ragged_scatter_add(rows, index, 9), baseline)
    finally:
        NATIVE.isa_native(best)


ROWS, CU = torch.zeros(4, 3), torch.tensor([0, 1, 4])


@needs_cpu
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NATIVE.ragged_unpack(ROWS, torch.tensor([0, 2, 5]), 3, 0.0, False), "at most 4 .*, got 5"),
        (lambda: NATIVE.ragged_unpack(ROWS, CU, 2, 0.0, True), "lengths of at most S = 2, got 3"),
        (lambda: NATIVE.ragged_unpack(ROWS, CU, -1, 0.0, True), "max_length: expected at least 0"),
        (lambda: NATIVE.ragged_unpack(ROWS.cfloat(), CU, 3, 0.0, True), "packed: expected a real or bool dtype"),
        (lambda: NATIVE.ragged_layout([CU], [4, 4], True), r"cu_seqlens: expected 2 tensors .*, got 1"),
        (lambda: NATIVE.ragged_layout([CU], [-4], True), "totals: expected at least 0, got -4"),
        (lambda: NATIVE.ragged_layout([CU, CU[:2]], [4, 4], True), "cu_seqlens: expected 3 offsets"),
        (lambda: NATIVE.ragged_gather([ROWS], [CU.repeat(2)[:4]], [CU], True), r"indices\[0\]: expected rows"),
        (lambda: NATIVE.ragged_gather([ROWS, ROWS[:, :2]], [None, None], [CU, CU], True), "a width of 3, got 2"),
        (lambda: NATIVE.ragged_gather([ROWS, ROWS.int()], [None, None], [CU, CU], True), "the dtype of the first one"),
        (lambda: NATIVE.ragged_gather([ROWS], [], [CU], True), "indices: expected 1 tensors or None .*, got 0"),
        (
            lambda: NATIVE.ragged_gather_backward(ROWS, [None], [CU], [5], [True]),
            "grad: expected 5 rows, got 4",
        ),
        (lambda: NATIVE.ragged_scatter_add(ROWS, torch.tensor([0, 1, 2, 3]), 3), r"in \[0, 3\), got 3"),
        (lambda: NATIVE.ragged_scatter_add(ROWS, torch.tensor([0, 1]), 3), "index: expected 4 values, got 2"),
        (lambda: NATIVE.ragged_scatter_add(ROWS.int(), torch.zeros(4).long(), 3), "a floating-point dtype"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
