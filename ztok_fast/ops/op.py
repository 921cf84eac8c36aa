"""What an op is: one declaration of its schema, reference, gradients and backends.

Each op is registered with torch twice, as two overloads of one name:

- `torch.ops.ztok.<op>` runs the kernel that a compiled library registers for the device, C++ for the CPU and CUDA C++
  for CUDA, picked by torch's dispatcher; where there is none, the best of the other backends.
- `torch.ops.ztok.<op>.backend` has one more argument, the name of a backend; "" chooses when it runs. This is what
  `torch.compile` sees.

In plain eager calls `Op.__call__` goes around torch's Python registration, which costs 10 to 30 µs a call, straight to
the compiled kernel. Forward-mode differentiation, `torch.func` transforms and double backward run the reference, which
is plain differentiable PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ztok_fast.ops.backends import Backend, BackendUnavailable, forced_backend, forced_backends, forcing, load
from ztok_fast.ops.spec import Spec

OPS: dict[str, Op] = {}
"""Every op by name, backward passes included, in the order of declaration."""

_LIBRARY = torch.library.Library("ztok", "FRAGMENT")
# What an op's arguments may be in a plain call: tensor subclasses dispatch for themselves.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str))
# What every call asks, looked up once.
_is_grad_enabled, _any_requires_grad = torch.is_grad_enabled, torch._C._any_requires_grad
_modes, _transform = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_forward_ad, _Functionalize = torch.autograd.forward_ad, torch._C._functorch.TransformType.Functionalize
_below_autograd = torch._C._AutoDispatchBelowAutograd
_OUTSIDE = torch._C._dispatch_tls_local_exclude_set()  # autocast's keys, while it is off
with _below_autograd():
    _AUTOGRAD_KEYS = torch._C._dispatch_tls_local_exclude_set() - _OUTSIDE


class Op:
    """An op with its backends; calling it runs the best, or the forced, one.

    Args:
        schema: "name(Tensor x, int n, ...) -> ..." as torch reads it. The first tensor decides device and dtype.
        reference: plain PyTorch function of the same arguments that defines the result; the last backend. For an op
            with `backward` it is differentiable, in forward mode too.
        fake: the same arguments -> empty outputs of the right shapes and dtypes.
        backends: in order of preference, the reference left out.
        backward: (args, outputs, grads, needs) -> a gradient or None per argument; None for an op without gradients.
            `needs` says which arguments need one; a list of tensors has a list there.
        linear: the result is linear in the arguments that receive gradients. Neither their values nor the outputs are
            kept in memory for `backward`, which gets tensors of the same shapes and dtypes and an empty tuple.
        keeps_outputs: whether the outputs are kept in memory for `backward`, which otherwise gets an empty tuple.
        check: the same arguments; raises ValueError for ranks, dtypes, devices and sizes that the op refuses. For ops
            whose compiled kernels refuse them too: it is called after those, to say what is wrong. Other ops are
            checked in their public functions.
        check_values: the same arguments; raises ValueError for values that the op refuses (`ztok_fast.ops.checks`).
        spec: sample cases, tolerances and costs (`ztok_fast.ops.spec`); None for a backward pass, which its forward's
            cases cover.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable,
        fake: Callable,
        backends: tuple[Backend, ...] = (),
        backward: Callable | None = None,
        linear: bool = False,
        keeps_outputs: bool = True,
        check: Callable = lambda *args: None,
        check_values: Callable = lambda *args: None,
        spec: Spec | None = None,
    ) -> None:
        self.name, signature = schema[: schema.index("(")], schema[schema.index("(") :]
        self.reference, self.backward, self.spec = reference, backward, spec
        self.check, self.check_values = check, check_values
        self.linear = linear
        self.keeps_outputs = keeps_outputs
        self.backends = (*backends, Backend("reference", reference))
        self.has_lists = "[]" in signature
        self._chosen: dict[tuple, tuple[Backend, ...]] = {}
        OPS[self.name] = self
        _LIBRARY.define(f"{self.name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        at = signature.index(") ->")
        _LIBRARY.define(
            f"{self.name}.backend{signature[:at]}, str backend{signature[at:]}", tags=(torch.Tag.pt2_compliant_tag,)
        )
        packet = getattr(torch.ops.ztok, self.name)
        self.default, self.by_name = packet.default, packet.backend
        self._compiled = self.default._op  # spares a frame
        _LIBRARY.impl(self.default, self._run_uncompiled, "CompositeExplicitAutograd")
        _LIBRARY.impl(self.by_name, self._run_by_name, "CompositeExplicitAutograd")

        def checked_fake(*args):  # also what runs where one of several tensors is on the device "meta"
            self.check(*args)
            return fake(*args)

        torch.library.register_fake(f"ztok::{self.name}", checked_fake, lib=_LIBRARY)
        torch.library.register_fake(f"ztok::{self.name}.backend", lambda *args: checked_fake(*args[:-1]), lib=_LIBRARY)
        for overload in (self.default, self.by_name):
            _LIBRARY.impl(overload, self._autograd_kernel(overload), "Autograd", with_keyset=True)

    def __repr__(self) -> str:
        return f"Op({self.name})"

    def __call__(self, *args):
        """Run it on the arguments of the registered op, all positional."""
        if torch.compiler.is_compiling():
            self.check(*args)
            return self.by_name(*args, "")
        try:
            name = forced_backend(self.name)
            if _transforms():
                return self._run_transformed(name, args)
            flat = _flatten(args) if self.has_lists else args
            if not _PLAIN.issuperset(map(type, flat)) or _modes():
                return self.by_name(*args, name or "")
            if _is_grad_enabled() and _any_requires_grad(*flat):
                return self._differentiable(name, args, flat)
            return self.run(self.choose(args, name, flat), args)
        except Exception:
            self.check(*args)
            raise

    # --- backends

    def has(self, name: str) -> bool:
        """Whether there is a backend of this name."""
        return any(backend.name == name for backend in self.backends)

    def choose(self, args: tuple, name: str | None = None, flat: Sequence | None = None) -> Backend:
        """The backend that runs the op on `args`: the one named, or the first that can.

        `flat`: the arguments without lists, where the caller has them.

        Raises:
            BackendUnavailable: none can, or the named one cannot.
        """
        main = self._main(args)
        if flat is None:
            flat = _flatten(args) if self.has_lists else args
        key = (name, id(self.backends), main.get_device(), *[a.dtype for a in flat if isinstance(a, Tensor)])
        able = self._chosen.get(key)
        if able is None:
            able = self._chosen[key] = self._able(name, main.device, key[3:])
        for backend in able:
            if backend.condition is None or backend.condition[1](*args):
                return backend
        raise BackendUnavailable(self._refusal(name, main.device, key[3:], args))

    def _main(self, args: tuple) -> Tensor:
        return args[0][0] if self.has_lists and not isinstance(args[0], Tensor) else args[0]

    def _able(self, name, device, dtypes) -> tuple[Backend, ...]:
        floats = [dtype for dtype in dtypes if dtype.is_floating_point]
        named = [b for b in self.backends if name is None or b.name == name]
        return tuple(b for b in named if next(b.unmet(device, floats, name is not None), None) is None)

    def _refusal(self, name, device, dtypes, args) -> str:
        floats = [dtype for dtype in dtypes if dtype.is_floating_point]
        reasons = {b.name: "; ".join(b.unmet(device, floats, name is not None, args)) for b in self.backends}
        if name is None:
            every = " | ".join(f"{backend}: {why}" for backend, why in reasons.items())
            return f"{self.name}: no backend can run it ({every})"
        why = reasons.get(name, "the op has no such backend")
        return f"{self.name}: the forced backend cannot run it ({name}: {why})"

    def run(self, backend: Backend, args: tuple):
        """Run one backend without recording gradients."""
        if not backend.compiled:
            self.check(*args)
        if not backend.checks_values:
            self.check_values(*args)
        try:
            if backend.compiled:
                with _below_autograd():
                    return self._compiled(*args)
            if backend.contiguous:
                args = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)
            function = load(backend.implementation)
            if backend.device_type != "cuda":
                return function(*args)
            with torch.cuda.device_of(self._main(args)):  # Triton launches on the current device
                return function(*args)
        except RuntimeError:
            if backend.checks_values:
                self.check(*args)
                self.check_values(*args)
            raise

    def _run_uncompiled(self, *args):
        able = [b for b in self.backends if not b.compiled]
        name = forced_backend(self.name)
        for backend in able:
            if name in (None, backend.name) and backend == self.choose(args, backend.name if name else None):
                return self.run(backend, args)
        return self.run(able[-1], args)

    def _run_by_name(self, *args):
        args, name = args[:-1], args[-1]
        return self.run(self.choose(args, name or forced_backend(self.name)), args)

    # --- gradients

    def _differentiable(self, name: str | None, args: tuple, flat):
        backend = self.choose(args, name, flat)
        if backend.name == "reference" and self.backward is not None:
            self.check(*args)
            self.check_values(*args)
            return self.reference(*args)
        return _Recorded.apply(self, lambda args: self.run(backend, args), forced_backends(), _shape_of(args), *flat)

    def _run_transformed(self, name: str | None, args: tuple):
        """Forward-mode differentiation and `torch.func` transforms."""
        if self.backward is None:
            raise RuntimeError(f"{self.name}: not differentiable, and no torch.func transform goes through it")
        if name not in (None, "reference"):
            raise BackendUnavailable(
                f"{self.name}: forward-mode differentiation and torch.func transforms run the reference, "
                f"but {name} is forced"
            )
        self.check(*args)
        return self.reference(*args)

    def _autograd_kernel(self, overload) -> Callable:
        named = overload is self.by_name

        def kernel(keyset, *args):
            if _forward_mode():
                name = args[-1] if named else ""
                return self._run_transformed(name or forced_backend(self.name), args[:-1] if named else args)
            flat = _flatten(args) if self.has_lists else args

            def below(args):
                with _below_autograd():
                    return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

            if not (_is_grad_enabled() and _any_requires_grad(*flat)):
                return below(args)
            forced = forced_backends()
            if named and args[-1]:
                forced = {**forced, **dict.fromkeys((self.name, f"{self.name}_backward"), args[-1])}
            return _Recorded.apply(self, below, forced, _shape_of(args), *flat)

        return kernel


class _Recorded(torch.autograd.Function):
    """A call of an op whose backward pass runs the op's own, on the backends that were forced for the forward pass."""

    @staticmethod
    def forward(ctx, op: Op, run: Callable, forced: dict, shape: tuple, *flat):
        outputs = run(_unflatten(flat, shape))
        ctx.op, ctx.forced, ctx.shape = op, forced, shape
        ctx.tensors = [isinstance(a, Tensor) and not (op.linear and a.requires_grad) for a in flat]
        # a tensor whose values nobody needs is kept as one zero of its shape
        ctx.others = [
            None if kept else a.new_zeros(()).expand(a.shape) if isinstance(a, Tensor) else a
            for a, kept in zip(flat, ctx.tensors)
        ]
        results = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        if op.linear or not op.keeps_outputs:
            results = ()
        ctx.save_for_backward(*(a for a, kept in zip(flat, ctx.tensors) if kept), *results)
        return tuple(outputs) if isinstance(outputs, list) else outputs

    @staticmethod
    def backward(ctx, *grads):
        op = ctx.op
        if op.backward is None:
            raise RuntimeError(f"{op.name}: not differentiable")
        saved = iter(ctx.saved_tensors)
        flat = [next(saved) if kept else other for kept, other in zip(ctx.tensors, ctx.others)]
        outputs = tuple(saved)
        args = _unflatten(flat, ctx.shape)[: len(op.default._schema.arguments)]
        needs_flat = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            flat_grads = vjp(op.reference, args, grads, needs_flat)
        else:
            with forcing(ctx.forced):
                flat_grads = _flatten_grads(op.backward(args, outputs, grads, _unflatten(needs_flat, ctx.shape)), args)
        return None, None, None, None, *flat_grads, *[None] * (len(needs_flat) - len(flat_grads))


def vjp(function: Callable, args: tuple, grads: tuple, needs=None) -> list[Tensor | None]:
    """Gradients of the tensors among `args` (lists flattened) by autograd through plain PyTorch; can be differentiated.

    Args:
        function: of `args`; returns a tensor or a tuple.
        grads: of its outputs; entries of outputs that have no gradient are not looked at.
        needs: which of the flattened arguments need a gradient; None for all floating-point tensors.
    """
    flat = _flatten(args)
    again = _is_grad_enabled() and _any_requires_grad(*flat, *grads)
    with torch.enable_grad(), _with_autograd():
        inputs = list(flat)
        for i, a in enumerate(flat):
            if isinstance(a, Tensor) and a.is_floating_point() and (needs is None or needs[i]):
                inputs[i] = a.view_as(a) if again and a.requires_grad else a.detach().requires_grad_()
        outputs = function(*_unflatten(inputs, _shape_of(args)))
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grads) if isinstance(o, Tensor) and o.requires_grad and g is not None]
        wanted = [i for i, a in enumerate(inputs) if isinstance(a, Tensor) and a is not flat[i]]
        found = torch.autograd.grad(
            [o for o, _ in pairs], [inputs[i] for i in wanted], [g for _, g in pairs],
            create_graph=again, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
    result: list[Tensor | None] = [None] * len(flat)
    for i, grad in zip(wanted, found):
        result[i] = grad
    return result


def _with_autograd():
    """Let autograd record even inside a kernel, below which torch's dispatcher has left it out."""
    left_out = torch._C._dispatch_tls_local_exclude_set() - _AUTOGRAD_KEYS
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), left_out)


def _forward_mode() -> bool:
    return _forward_ad._current_level >= 0


def _transforms() -> bool:
    """Whether forward-mode differentiation or a `torch.func` transform is at work; functionalisation is none."""
    top = _transform()
    return _forward_ad._current_level >= 0 or top is not None and top.key() != _Functionalize


def _flatten(args) -> list[Any]:
    flat: list[Any] = []
    for a in args:
        if isinstance(a, (list, tuple)):
            flat.extend(a)
        else:
            flat.append(a)
    return flat


def _shape_of(args) -> tuple[int | None, ...]:
    """Length of each argument that is a list, None for the others."""
    return tuple(len(a) if isinstance(a, (list, tuple)) else None for a in args)


def _unflatten(flat, shape: tuple[int | None, ...]) -> tuple:
    flat = iter(flat)
    return tuple(next(flat) if size is None else [next(flat) for _ in range(size)] for size in shape)


def _flatten_grads(grads, args) -> list[Tensor | None]:
    return _flatten(
        [None] * len(a) if grad is None and isinstance(a, (list, tuple)) else grad for grad, a in zip(grads, args)
    )
