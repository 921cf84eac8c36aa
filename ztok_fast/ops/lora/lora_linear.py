"""`lora_linear`: linear layer with low-rank adapters, one or several in one batch.

x Aᵀ is called the shrink product, its result times Bᵀ the expand product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import UP_TO_FLOAT32, cpp, cuda, triton
from ztok_fast.ops.lora import reference
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import BACKWARD, Case, CaseTable, Mismatch, Spec, Work, close, randn, some_rows

OP = "lora_linear"


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: Tensor,
    adapters: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Linear layer with low-rank adapters: y = x Wᵀ + bias + s (x Aᵀ) Bᵀ, every row under its own adapter.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    Args:
        x: [M, in], float16, bfloat16, float32 or float64.
        weight: [out, in], dtype of `x`.
        bias: [out], dtype of `x`, or None.
        A: [n, r, in], dtype of `x` or float32: the n adapters' shrink weights.
        B: [n, out, r], dtype of `A`: their expand weights.
        scaling: float32 (float64 for float64 `x`) [n], constant: usually alpha / r.
        adapters: the adapter of each row, int32 [M] with values in [-1, n), -1 for the base layer alone; with
            `cu_seqlens` that of each sequence, int32 [B]; None for adapter 0 everywhere, which needs n = 1.
        cu_seqlens: int32 or int64 [B + 1], only with `adapters`.

    Returns:
        [M, out], dtype of `x`. The low-rank products are accumulated in fp32 (float64 for float64) and rounded once,
        when they are added to x Wᵀ + bias. A row does not depend on the adapters that it does not use, NaN in them
        included.

        Differentiable in `x`, `A`, `B`, and in `weight` and `bias` where they require a gradient; gradients have the
        dtypes of the arguments. Nothing of the size of `weight` is made besides its own gradient.

        O(M in out + M r (in + out)) time for any number of adapters in compiled code, n times the low-rank part in the
        reference; O(M r) extra memory, in half precision on the CPU O(M in).

        Under `torch.autocast` x, weight and bias are cast to the autocast dtype first, as a linear layer does.

    Raises:
        ValueError: wrong rank, dtype, device or size, `adapters` missing with n > 1, `scaling` that requires a
            gradient; under the value checks (`ztok_fast.ops.checks`) also an adapter out of range and `cu_seqlens`
            that do not add up to M.
    """
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)

        def cast(t):
            return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

        x, weight, bias = cast(x), cast(weight), cast(bias)
    if getattr(scaling, "requires_grad", False):
        checks.fail(OP, "scaling", "a constant", "a tensor that requires a gradient")
    return LORA_LINEAR(x, weight, bias, A, B, scaling, adapters, cu_seqlens)


def _check(x, weight, bias, A, B, scaling, adapters, cu_seqlens) -> None:
    given = checks.Arguments(OP)
    given.tensor("x", x, "[M, in]")
    given.tensor("weight", weight, "[out, in]", "x")
    if bias is not None:
        given.tensor("bias", bias, "[out]", "x")
    accumulate = checks.compute_dtype(x)
    given.tensor("A", A, "[n, r, in]", (x.dtype, accumulate), empty=False)
    given.tensor("B", B, "[n, out, r]", "A")
    given.tensor("scaling", scaling, "[n]", (accumulate, torch.float32))
    check_choice_of_adapters(given, "A", A.shape[0], adapters, cu_seqlens)


def check_choice_of_adapters(given: checks.Arguments, stack: str, count: int, adapters, cu_seqlens) -> None:
    """For the rows x [M, in], or their sequences, of the adapters whose number the argument `stack` says."""
    if adapters is None:
        if count != 1:
            checks.fail(given.op, "adapters", f"an int32 tensor, because {stack} holds {count} adapters", "None")
        if cu_seqlens is not None:
            checks.fail(given.op, "cu_seqlens", "None where adapters is None", checks.describe(cu_seqlens))
        return
    if cu_seqlens is not None:
        given.tensor("cu_seqlens", cu_seqlens, "[B + 1]", checks.INDICES)
    given.tensor("adapters", adapters, "[M]" if cu_seqlens is None else "[B]", (torch.int32,))


def _check_values(x, weight, bias, A, B, scaling, adapters, cu_seqlens) -> None:
    check_adapter_values(OP, -1, A.shape[0], adapters, cu_seqlens, x.shape[0])


def check_adapter_values(op, lowest, count, adapters, cu_seqlens, rows) -> None:
    """Adapters in [lowest, count) and offsets that add up to the rows, where they are given."""
    if cu_seqlens is not None:
        checks.check_cu_seqlens_values(op, "cu_seqlens", cu_seqlens, rows)
    if adapters is not None:
        expected = f"in [{lowest}, {count})" + (" (-1 = none, else an adapter)" if lowest < 0 else "")
        checks.check_range_values(op, "adapters", adapters, lowest, count - 1, expected)


def _few_rows(x, weight, *_) -> bool:
    # The CUDA C++ kernel would copy a transposed weight, as GPT-2 has it, at every call.
    return x.shape[0] <= 64 and weight.stride(1) <= weight.stride(0)


def _fake(x, weight, *_):
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_backward(grad, x, weight, A, B, scaling, adapters, cu_seqlens, needs):
    given = x, weight, weight.new_empty(weight.shape[0]), A, B
    return tuple(t.new_empty(t.shape) if needed else grad.new_empty(0) for t, needed in zip(given, needs))


def _backward(args, outputs, grads, needs):
    x, weight, _, *others = args
    needs = needs[:5]  # x, weight, bias, A, B
    found = LORA_LINEAR_BACKWARD(grads[0], x, weight, *others, list(needs))
    return *(grad if needed else None for grad, needed in zip(found, needs)), None, None, None


# --- specification


def make(sizes, dtype, generator):
    """`M` rows through a layer `in` -> `out` with `n` adapters of rank `r`.

    Several adapters are chosen for sequences of one row or more each, in turn, as compressor, decompressor and
    inferencer stand side by side in a batch. Options: `by_row` chooses at random for each row, -1 included; `bias`
    adds one; `wide` keeps the adapters in float32.
    """
    M, width, out, r, n = (sizes[name] for name in ("M", "in", "out", "r", "n"))
    own = torch.promote_types(dtype, torch.float32) if sizes.get("wide") else dtype
    chosen = some_adapters(sizes, -1, generator)
    return {
        "x": randn(generator, M, width, dtype=dtype),
        "weight": randn(generator, out, width, scale=width**-0.5, dtype=dtype),
        "bias": randn(generator, out, dtype=dtype) if sizes.get("bias") else None,
        "A": randn(generator, n, r, width, scale=width**-0.5, dtype=own),
        "B": randn(generator, n, out, r, scale=r**-0.5, dtype=own),
        "scaling": torch.tensor([2.0, 1.0, 0.5], device=generator.device)[:n],
        **chosen,
    }


def some_adapters(sizes, lowest, generator) -> dict[str, Tensor | None]:
    """Of `n` adapters those of `M` rows: of sequences in turn, at random from `lowest` on `by_row`, None for n = 1."""
    M, n, device = sizes["M"], sizes["n"], generator.device
    adapters = cu_seqlens = None
    if sizes.get("by_row"):
        adapters = torch.randint(lowest, n, (M,), generator=generator, dtype=torch.int32, device=device)
    elif n > 1:
        sequences = min(M, 2 * n)
        adapters = torch.arange(sequences, dtype=torch.int32, device=device) % n
        ends = [0, *(M * (i + 1) // sequences for i in range(sequences))]
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    return {"adapters": adapters, "cu_seqlens": cu_seqlens}


def adapter_of_rows(x, adapters, cu_seqlens) -> Tensor:
    """int64 [M], -1 for none."""
    if adapters is None:
        return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return adapters.long() if cu_seqlens is None else adapters.long().repeat_interleave(cu_seqlens.long().diff())


def check(inputs, y) -> None:
    """All rows, or evenly spread ones where that is cheaper, against float64."""
    x, weight, A, B = (inputs[name].detach() for name in ("x", "weight", "A", "B"))
    (M, width), out = x.shape, weight.shape[0]
    if y.shape != (M, out) or y.dtype != x.dtype:
        raise Mismatch(f"y: expected {x.dtype} {[M, out]}, got {y.dtype} {list(y.shape)}")
    if M == 0:
        return
    rows = some_rows(M, width * out).to(x.device)
    chosen = adapter_of_rows(x, inputs["adapters"], inputs["cu_seqlens"])[rows]
    wide_x = x[rows].double()
    expected = wide_x @ weight.double().T
    if inputs["bias"] is not None:
        expected += inputs["bias"].detach().double()
    for i in range(len(A)):
        own = chosen == i
        low_rank = float(inputs["scaling"][i]) * (wide_x[own] @ A[i].double().T)
        expected[own] += low_rank @ B[i].double().T
    close(y.detach()[rows], expected, x.dtype, 4, "y")


# hidden size, feed-forward size
_SMOLLM2, _QWEN3, _LLAMA_7B, _LLAMA_8B = (576, 1536), (1024, 3072), (4096, 11008), (4096, 14336)


def _cases() -> tuple[Case, ...]:
    table = CaseTable("M", "in", "out", "r", "n")

    def add(M, width, out, r, smallest, n=1, **fields):
        # The weights of a decode step come from memory: a model has many layers.
        table(M, width, out, r, n, smallest, cold=M < 64, **fields)

    half = torch.bfloat16
    small, middle, large = _SMOLLM2, _QWEN3, _LLAMA_7B
    add(7, 12, 9, 2, "tiny")
    add(7, 12, 9, 2, "tiny", n=3, direction=BACKWARD)
    add(1, *small, 16, "quick", tags=("compile",))
    add(512, *small, 16, "quick", tags=("compile",))
    for M in (1, 512):
        add(M, small[0], small[0], 16, "default")
        add(M, *small[::-1], 32, "default")
        add(M, *middle, 16, "default")
        add(M, *small, 16, "default", n=3)
        add(M, large[0], large[0], 16, "default")
        add(M, *small, 128, "default")
        add(M, *large, 16, "full")
        add(M, *_LLAMA_8B, 16, "full")
        add(M, *_LLAMA_8B[::-1], 64, "full")
    add(8, *small, 16, "default", n=3)
    add(1, *small, 16, "default", dtype=half)
    add(1, *large, 16, "default", dtype=half)
    add(512, *small, 16, "default", dtype=half)
    for M in (64, 2048):
        add(M, *small, 16, "full", dtype=half)
    add(512, *small, 16, "full", dtype=half, direction=BACKWARD)
    for n in (1, 3):
        add(512, *small, 16, "default", n=n, direction=BACKWARD)
    add(512, *middle, 16, "default", direction=BACKWARD)
    for M in (1, 16, 64, 512, 8192):
        for sizes in (middle, large):
            add(M, *sizes, 16, "default", dtype=half, devices=("cuda",), tags=("compile",) if M == 8192 else ())
            add(M, *sizes, 16, "default", n=3, dtype=half, devices=("cuda",))
    for r in (16, 64, 128):
        add(8192, *large, r, "default", direction=BACKWARD, dtype=half, devices=("cuda",))
    add(8192, *large, 16, "default", n=3, direction=BACKWARD, dtype=half, devices=("cuda",))
    return table.cases()


def _work(case, inputs):
    M, width, out, r, size = case["M"], case["in"], case["out"], case["r"], case.dtype.itemsize
    used = min(case["n"], M)
    low = 2.0 * M * r * (width + out)
    parameters = width * out + used * r * (width + out)
    least = Work(2.0 * M * width * out + low, (M * (width + out) + parameters) * size)
    if case.direction == BACKWARD:
        moved = (M * (2 * width + out) + parameters + used * r * (width + out)) * size
        return Work(least.flops + 2.0 * M * width * out + 2 * low, least.bytes + moved)
    return least


LORA_LINEAR = Op(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor scaling, Tensor? adapters,"
    " Tensor? cu_seqlens) -> Tensor",
    reference=reference.lora_linear,
    fake=_fake,
    backends=(
        cpp(UP_TO_FLOAT32, checks_values=True),
        cuda(
            UP_TO_FLOAT32,
            condition=("x has at most 64 rows and the weight's inputs lie closer together than its outputs", _few_rows),
        ),
        triton("lora.triton:lora_linear", contiguous=False),
    ),
    backward=_backward,
    keeps_outputs=False,
    check=_check,
    check_values=_check_values,
    spec=Spec(
        lora_linear,
        make,
        samples=(
            {"M": 6, "in": 4, "out": 5, "r": 2, "n": 1},
            {"M": 7, "in": 12, "out": 9, "r": 2, "n": 3, "bias": True},
            {"M": 37, "in": 65, "out": 100, "r": 17, "n": 3, "bias": True, "by_row": True},
            {"M": 1, "in": 33, "out": 17, "r": 5, "n": 1, "bias": True},
            {"M": 0, "in": 8, "out": 3, "r": 1, "n": 2, "bias": True, "by_row": True},
            {"M": 1, "in": 1, "out": 1, "r": 1, "n": 1, "by_row": True},
            {"M": 5, "in": 40, "out": 24, "r": 4, "n": 2, "by_row": True, "wide": True},
            {"M": 64, "in": 16, "out": 31, "r": 8, "n": 3},
            {"M": 3, "in": 15, "out": 17, "r": 9, "n": 3, "bias": True},
            {"M": 37, "in": 17, "out": 100, "r": 2, "n": 3},
            {"M": 37, "in": 3, "out": 17, "r": 9, "n": 2, "by_row": True},
            {"M": 3, "in": 65, "out": 17, "r": 33, "n": 1, "bias": True},
            {"M": 100, "in": 33, "out": 65, "r": 15, "n": 3, "by_row": True},
        ),
        check=check,
        differentiable=("x", "weight", "bias", "A", "B"),
        leaves=("x", "A", "B"),
        tolerance=2,
        cases=_cases(),
        work=_work,
    ),
)

LORA_LINEAR_BACKWARD = Op(
    "lora_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor A, Tensor B, Tensor scaling, Tensor? adapters,"
    " Tensor? cu_seqlens, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.lora_linear_backward,
    fake=_fake_backward,
    backends=(cpp(UP_TO_FLOAT32), triton("lora.triton:lora_linear_backward", contiguous=False)),
)
