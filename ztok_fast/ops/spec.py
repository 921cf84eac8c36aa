"""The specification of an op: sample inputs, exactness and costs. Tests, guard pages, ahead-of-time compilation and
benchmarks iterate over it, so that each of these facts stands once, beside the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FORWARD = "forward"
BACKWARD = "forward+backward"
SETS = ("tiny", "quick", "default", "full")
"""Sets of benchmark cases. `tiny` is for tests; each of the others contains the ones before it, `tiny` excepted."""

# dtype of the input -> (relative, absolute) tolerance of a result accumulated in float32 (float64 for float64); an op's
# `tolerance` widens both
TOLERANCES = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (2e-5, 2e-6),
    torch.bfloat16: (1.6e-2, 1.6e-2),
    torch.float16: (2e-3, 2e-3),
}


class Mismatch(AssertionError):
    """A result is not the float64 answer within the op's tolerance."""


@dataclass(frozen=True)
class Work:
    """The least that any implementation has to do.

    Attributes:
        flops: floating-point operations, a multiply-add counted as two.
        bytes: each input read once, each output written once.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """One op at one shape, to be benchmarked.

    Attributes:
        sizes: named sizes and options, in the order in which they are printed.
        dtype: dtype of the op's main tensor.
        direction: `FORWARD` or `BACKWARD` (forward and backward in one measurement).
        set: smallest of `SETS` that has the case.
        devices: device types it is meant for.
        cold: rotate over inputs that together exceed the last cache, because in use they come from memory (the
            weights of a decode step). On CUDA every case is.
        tags: marks that baselines look at.
    """

    sizes: dict[str, Any]
    dtype: torch.dtype = torch.float32
    direction: str = FORWARD
    set: str = "default"
    devices: tuple[str, ...] = ("cpu", "cuda")
    cold: bool = False
    tags: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.sizes[name]


class CaseTable:
    """Cases in the making: call it with the sizes that `names` names, the smallest set that has the case, and any other
    fields of `Case`; `both`: one case for either direction. Of two that differ in their sets alone the first stays.
    """

    def __init__(self, *names: str, **fields: Any) -> None:
        self.names, self.fields = names, fields
        self.found: dict[tuple, Case] = {}

    def __call__(self, *values: Any, both: bool = False, **fields: Any) -> None:
        if both:
            self(*values, **fields)
            fields["direction"] = BACKWARD
        *sizes, smallest = values
        case = Case(dict(zip(self.names, sizes, strict=True)), set=smallest, **{**self.fields, **fields})
        self.found.setdefault((*sizes, case.dtype, case.direction), case)

    def cases(self) -> tuple[Case, ...]:
        """Those found so far, in their order."""
        return tuple(self.found.values())


@dataclass(frozen=True)
class Spec:
    """What tests and benchmarks need to know of an op.

    Attributes:
        public: the public function.
        make: (sizes, dtype, generator) -> its keyword arguments, on the generator's device.
        samples: small adversarial sizes and options for `make`: around the widths of vectors and blocks, empty, ragged.
        check: (inputs, result) raises `Mismatch` unless the result is exact as the docstring says. None: the result is
            compared with that of the reference in float64.
        differentiable: arguments that receive gradients; a list of tensors counts as one.
        leaves: those of `differentiable` that benchmarks take gradients of; None for all.
        outputs: (result) -> the outputs through which gradients flow.
        tolerance: how much wider than `TOLERANCES` results may be off; gradients four times that.
        dtypes: dtypes of the main tensor that samples are made in.
        cases: benchmark cases.
        work: (case, inputs) -> `Work` of the forward pass, or of both where the case has both directions.
        flops_of_reference: how many times the flops of `work` the reference does, for a guess of its time.
    """

    public: Callable
    make: Callable[[dict[str, Any], torch.dtype, torch.Generator], dict[str, Any]]
    samples: tuple[dict[str, Any], ...]
    check: Callable[[dict[str, Any], Any], None] | None = None
    differentiable: tuple[str, ...] = ()
    leaves: tuple[str, ...] | None = None
    outputs: Callable[[Any], tuple[Tensor, ...]] = field(default=lambda result: (result,))
    tolerance: float = 1.0
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    cases: tuple[Case, ...] = ()
    work: Callable[[Case, dict[str, Any]], Work] | None = None
    flops_of_reference: float = 1.0


def randn(generator: torch.Generator, *shape: int, dtype=torch.float32, scale: float = 1.0) -> Tensor:
    """Standard normal values times `scale` on the generator's device, rounded to `dtype`."""
    return (torch.randn(shape, generator=generator, device=generator.device) * scale).to(dtype)


def mixed_lengths(sequences: int, longest: int, generator: torch.Generator) -> list[int]:
    """Lengths from 1 to `longest`, skewed to the short side as documents are: on average about 0.4 of the longest.

    The first is the longest, so that a padded batch has exactly that width.
    """
    draws = torch.rand(sequences, generator=generator, device=generator.device).tolist()
    lengths = [max(1, round(longest * draw**1.5)) for draw in draws]
    return [longest, *lengths[1:]]


def lengths_of(sizes: dict[str, Any], generator: torch.Generator) -> list[int]:
    """The sizes' own `lengths`, or those of `B` mixed sequences of at most `S` rows."""
    return list(sizes["lengths"]) if "lengths" in sizes else mixed_lengths(sizes["B"], sizes["S"], generator)


def offsets(lengths: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_seqlens [B + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def some_rows(rows: int, cost: int, most: int = 1 << 30) -> Tensor:
    """Rows to check where one costs so much of `most`: all, or evenly spread ones with the first and the last."""
    return torch.linspace(0, rows - 1, min(rows, max(2, most // cost))).round().long().unique()


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0, what: str = "result") -> None:
    """Raise `Mismatch` where `actual` is further from `expected` than `scale` times the tolerance of `dtype`."""
    rtol, atol = (scale * t for t in TOLERANCES[dtype])
    try:
        torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise Mismatch(f"{what}: {'; '.join(lines[:4])}") from None


def equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raise `Mismatch` unless two tensors are the same, bit for bit (NaN equal to NaN)."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise Mismatch(
            f"{what}: expected {expected.dtype} {list(expected.shape)}, got {actual.dtype} {list(actual.shape)}"
        )
    same = actual == expected
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    if not bool(same.all()):
        raise Mismatch(f"{what}: {int((~same).sum())} of {same.numel()} elements differ")


def same_as(function: Callable) -> Callable[[dict[str, Any], Any], None]:
    """A `check` for a `Spec` with a named tuple as result: it is what a function of the inputs gives, bit for bit."""

    def check(inputs: dict[str, Any], result: Any) -> None:
        for name, got, wanted in zip(result._fields, result, function(*inputs.values()), strict=True):
            equal(got, wanted, name)

    return check
