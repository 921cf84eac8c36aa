"""What a benchmark is made of: cases (an op at one shape), the work they do at least, and peers to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FORWARD = "forward"
BACKWARD = "forward+backward"
SETS = ("tiny", "quick", "default", "full")
"""Sets of shapes. `tiny` is for tests; each of the others contains the ones before it, `tiny` excepted."""


class Mismatch(AssertionError):
    """An answer is not the float64 answer, within the tolerances of the op's tests."""


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
    """One op at one shape.

    Attributes:
        op: name in the registry.
        shape: named sizes, in the order in which they are printed.
        dtype: dtype of the op's main tensor.
        direction: `FORWARD` or `BACKWARD` (forward and backward in one measurement).
        set: smallest of `SETS` that has the case.
        devices: device types it is meant for.
        cold: rotate over inputs that together exceed the last cache, because in use they come from memory (the
            weights of a decode step). On CUDA every case is.
        tags: marks that peers look at (`"compile"`: worth the seconds that `torch.compile` takes).
    """

    op: str
    shape: dict[str, Any]
    dtype: torch.dtype = torch.float32
    direction: str = FORWARD
    set: str = "default"
    devices: tuple[str, ...] = ("cpu", "cuda")
    cold: bool = False
    tags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What identifies a case in results and on the command line."""
        sizes = ",".join(f"{name}={value}" for name, value in self.shape.items())
        return f"{self.op}[{sizes}]/{short(self.dtype)}/{self.direction}"

    def __getitem__(self, name: str) -> Any:
        return self.shape[name]


def short(dtype: torch.dtype) -> str:
    """`"float32"` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def always(case: Case) -> str | None:
    """No reason against any case."""
    return None


@dataclass(frozen=True)
class Peer:
    """Something else that answers the same question, or a mark: what a library routine takes for the same work.

    Attributes:
        name: printed and stored.
        prepare: (case, inputs) -> a function without arguments that makes one call. What a user would do once (build
            an index, copy weights into a layer) happens in `prepare` and is not timed.
        read: (raw result of the call) -> what the op's `check_peer` takes; None where the peer's answer is not the
            op's by design (a mark, another random draw): it is then not checked, and said to be unchecked.
        package: package that must be importable.
        distribution: its name for pip.
        kind: "peer"; "mark": it gives no answer that could replace the op's; "variant": the same from ops of ours.
        note: how it was used, for the documentation.
        devices: device types.
        max_sets: prepare at most so many input sets: what it reads itself exceeds the caches many times.
        refuses: (case) -> why it cannot or should not run on a case, or None.
        bytes: (case, inputs) -> what one call reads and writes where that is not what the op does.
    """

    name: str
    prepare: Callable[[Case, dict], Callable[[], Any]]
    read: Callable[[Any], Any] | None = None
    package: str | None = None
    distribution: str | None = None
    kind: str = "peer"
    note: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    max_sets: int | None = None
    refuses: Callable[[Case], str | None] = always
    bytes: Callable[[Case, dict], float] | None = None


@dataclass(frozen=True)
class Op:
    """One op of the registry.

    Attributes:
        name: as in `ztok_fast.ops.requirements`.
        cases: all cases, of all sets and devices.
        make: (case, device, generator) -> inputs; leaves of `BACKWARD` cases require gradients.
        main: (inputs) -> the op's main tensor, which decides the backend.
        run: (case, inputs) -> result of the public function, with gradients for `BACKWARD`.
        check: (case, inputs, result) raises `Mismatch`. The contract's own exactness.
        check_peer: the same for what a peer's `read` returns; may be looser (a peer promises less).
        work: (case, inputs) -> `Work`.
        peers: peers and marks.
        companions: ops that `run` also calls, whose backend is to be the same where it exists; of a whole run those
            whose backends are recorded.
        flops_of_reference: how many times the flops of `work` the reference does in float64, for a guess of its time.
        whole: a run of the whole codec (`bench.codec`). It has no row in the requirements table and one contender of its
            own, "ours", in which every op chooses its backend; `main` is not asked, one input set is made, no graph.
        needs: (case) -> what the machine lacks for it, or None.
    """

    name: str
    cases: tuple[Case, ...]
    make: Callable[[Case, torch.device, torch.Generator], dict]
    main: Callable[[dict], Tensor]
    run: Callable[[Case, dict], Any]
    check: Callable[[Case, dict, Any], None]
    work: Callable[[Case, dict], Work]
    check_peer: Callable[[Case, dict, Any], None] | None = None
    peers: tuple[Peer, ...] = ()
    companions: tuple[str, ...] = ()
    flops_of_reference: float = 1.0
    whole: bool = False
    needs: Callable[[Case], str | None] = always


def with_gradients(outputs: Iterable[Tensor], leaves: Iterable[Tensor], grads: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of `leaves` for given gradients of `outputs`."""
    return torch.autograd.grad(list(outputs), list(leaves), list(grads))


def randn(generator: torch.Generator, *shape: int, dtype=torch.float32, scale: float = 1.0) -> Tensor:
    """Standard normal values times `scale` on the generator's device, rounded to `dtype`."""
    return (torch.randn(shape, generator=generator, device=generator.device) * scale).to(dtype)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0, what: str = "result") -> None:
    """Raise `Mismatch` where `actual` is beyond the tolerance of the op tests for `dtype`, `scale` times wider."""
    from tests.ops.tolerances import assert_close

    try:
        assert_close(actual, expected, dtype, scale)
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
