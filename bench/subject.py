"""What is benchmarked: an op or a run of the whole codec, its cases, its check, and baselines to compare with."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import ztok_fast
from ztok_fast.ops.op import OPS
from ztok_fast.ops.spec import BACKWARD, FORWARD, Case, Mismatch, close

MOST_OFF = 0.05
"""Relative error of a gradient, in norm, where rounding decided between two codes that are equally near."""


def short(dtype: torch.dtype) -> str:
    """`"float32"` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def any_case(case: Case) -> str | None:
    """No reason against any case."""
    return None


def forward_only(case: Case) -> str | None:
    return None if case.direction == FORWARD else "forward only"


def forward_float32(case: Case) -> str | None:
    return forward_only(case) or (None if case.dtype == torch.float32 else "takes float32")


def same(answer):
    """`read` of a baseline whose call returns what the check takes."""
    return answer


@dataclass(frozen=True)
class Baseline:
    """Something else that answers the same question, or a mark: what a library routine takes for the same work.

    Attributes:
        name: printed and stored.
        prepare: (case, inputs) -> a function without arguments that makes one call. What a user does once (build an
            index, copy weights into a layer) happens in `prepare` and is not timed.
        read: (what the call returns) -> what `Subject.check_baseline` takes. None where the answer is not the op's by
            design (a mark, another random draw): it is not checked, and the results say so.
        package: package that must be importable; `distribution` is its name for pip, where that differs.
        kind: "baseline", or "mark": it gives no answer that could replace the op's.
        note: how it is used, for the document.
        devices: device types.
        max_sets: prepare at most so many input sets: what it reads itself exceeds the caches many times.
        refuses: (case) -> why it cannot or should not run on a case, or None.
        bytes: (case, inputs) -> what one call reads and writes where that is not what the op does.
    """

    name: str
    prepare: Callable[[Case, Any], Callable[[], Any]]
    read: Callable[[Any], Any] | None = None
    package: str | None = None
    distribution: str | None = None
    kind: str = "baseline"
    note: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    max_sets: int | None = None
    refuses: Callable[[Case], str | None] = any_case
    bytes: Callable[[Case, Any], float] | None = None


class Inputs(dict):
    """Keyword arguments of an op's public function.

    Attributes:
        leaves: the tensors whose gradients are asked for.
        known: what was computed from the inputs once, by name (the float64 answer).
    """

    def __init__(self, arguments: dict[str, Any], seed: int, leaves: tuple[Tensor, ...] = ()) -> None:
        super().__init__(arguments)
        self.seed, self.leaves, self.known = seed, leaves, {}

    def gradients(self, *outputs: Tensor, leaves=None) -> tuple[Tensor, ...]:
        """Gradients of the leaves, or of others in their place; the gradients of the outputs are always the same."""
        grads = []
        for i, output in enumerate(outputs):
            if i not in self.known:
                draw = torch.Generator(output.device).manual_seed(self.seed + i)
                self.known[i] = torch.randn(output.shape, generator=draw, device=output.device).to(output.dtype)
            grads.append(self.known[i].to(output.dtype))
        return torch.autograd.grad(outputs, self.leaves if leaves is None else leaves, grads)


@dataclass(frozen=True)
class Subject:
    """An op or a run of the whole codec. A subclass has the functions

    - `make(case, generator)`: inputs on the generator's device;
    - `run(case, inputs)`: what is timed;
    - `check(case, inputs, found)`: raises `Mismatch` unless `run` returned the right answer;
    - `check_baseline(case, inputs, answer)`: the same for what a baseline's `read` returns; may be looser;
    - `work(case, inputs)`: the least that any implementation has to do.

    Attributes:
        name: of the op, or of the run.
        baselines: baselines and marks.
        companions: other ops that are called and whose backend should be the same where it exists; of a whole run
            those whose backends are recorded.
        cases: all cases, of all sets and devices.
        whole: a run of the whole codec (`bench.codec`). It has one implementation of its own, "ours", in which every
            op chooses its backend; one input set is made, no graph.
    """

    name: str
    baselines: tuple[Baseline, ...]
    companions: tuple[str, ...] = ()

    cases: ClassVar[tuple[Case, ...]] = ()
    whole: ClassVar[bool] = False

    def key(self, case: Case) -> str:
        """What identifies a case in results and on the command line."""
        sizes = ",".join(f"{name}={value}" for name, value in case.sizes.items())
        return f"{self.name}[{sizes}]/{short(case.dtype)}/{case.direction}"

    def seed(self, case: Case) -> int:
        return zlib.crc32(self.key(case).encode())  # and not hash(): the same inputs in every process

    def needs(self, case: Case) -> str | None:
        """What the machine lacks for a case, or None."""
        return None


@dataclass(frozen=True)
class OpSubject(Subject):
    """An op, by the specification that stands beside it (`ztok_fast.ops.spec.Spec`).

    Attributes:
        loose_check: (inputs, answer) raises `Mismatch`; None: `check`, with an answer of (result, gradients).
    """

    loose_check: Callable[[Inputs, Any], None] | None = None

    @property
    def op(self):
        return OPS[self.name]

    @property
    def cases(self):
        return self.op.spec.cases

    def make(self, case, generator):
        spec = self.op.spec
        inputs = Inputs(spec.make(case.sizes, case.dtype, generator), generator.initial_seed())
        if case.direction == BACKWARD:
            names = spec.leaves or spec.differentiable
            inputs.leaves = tuple(t for name in names for t in tensors_in(inputs[name]))
            for leaf in inputs.leaves:
                leaf.requires_grad_()
        return inputs

    def run(self, case, inputs):
        spec = self.op.spec
        result = spec.public(**inputs)
        if case.direction == FORWARD:
            return result, ()
        return result, inputs.gradients(*(o for o in spec.outputs(result) if o.requires_grad))

    def check(self, case, inputs, found):
        spec, (result, grads) = self.op.spec, found
        with torch.no_grad():
            if spec.check is not None:
                spec.check(tree_map_only(Tensor, Tensor.detach, dict(inputs)), result)
            else:
                for got, wanted in zip(spec.outputs(result), spec.outputs(self.exact(inputs)[0]), strict=True):
                    close(got, wanted, case.dtype, spec.tolerance)
        if case.direction == BACKWARD:
            self.check_gradients(case, inputs, result, grads)

    def check_baseline(self, case, inputs, answer):
        if self.loose_check is None:
            return self.check(case, inputs, answer)
        self.loose_check(inputs, answer)

    def work(self, case, inputs):
        return self.op.spec.work(case, inputs)

    def arguments(self, inputs: Inputs) -> tuple:
        """What the public function calls the registered op with."""

        class Found(Exception):
            pass

        class Catch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(mode, function, types, args=(), kwargs=None):
                if function is self.op.by_name:
                    raise Found(args[:-1])
                return function(*args, **(kwargs or {}))

        try:
            with torch.no_grad(), Catch():
                self.op.spec.public(**inputs)
        except Found as found:
            return found.args[0]
        raise RuntimeError(f"{self.name}: its public function did not call it")

    def exact(self, inputs):
        """Result and gradients of the reference in float64."""
        if "exact" not in inputs.known:
            wide_of: dict[int, Tensor] = {}  # one for each tensor that there is, by its id

            def widen(t):
                return wide_of.setdefault(id(t), t.detach().double()) if t.is_floating_point() else t

            wide = tree_map_only(Tensor, widen, dict(inputs))
            leaves = [wide_of[id(leaf)].requires_grad_() for leaf in inputs.leaves]
            with ztok_fast.backend("reference"), torch.set_grad_enabled(bool(leaves)):
                result = self.op.spec.public(**wide)
                outputs = [o for o in self.op.spec.outputs(result) if o.requires_grad]
                grads = inputs.gradients(*outputs, leaves=leaves) if leaves else ()
            inputs.known["exact"] = result, grads
        return inputs.known["exact"]

    def check_gradients(self, case, inputs, result, grads):
        expected, wanted = self.exact(inputs)
        ours, theirs = ([t for t in tensors_in(r) if not t.is_floating_point()] for r in (result, expected))
        decided_alike = all(a.shape == b.shape and bool((a == b).all()) for a, b in zip(ours, theirs))
        for i, (got, exact) in enumerate(zip(grads, wanted, strict=True)):
            # Sums of terms of either sign: what cancels is measured against the size of the whole gradient.
            size = exact.square().mean().sqrt().clamp(min=1e-30)
            if decided_alike:
                close(got / size, exact / size, case.dtype, 4 * self.op.spec.tolerance, f"gradient {i}")
            elif (off := float((got - exact).norm() / exact.norm())) > MOST_OFF:
                raise Mismatch(f"gradient {i}: off by {off:.1%}")


def tensors_in(found) -> list[Tensor]:
    """The tensors in nested tuples and lists."""
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
