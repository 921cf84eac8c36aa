"""Which backend runs an op.

The preferred backend whose row in `ztok_fast.ops.requirements` is satisfied runs, unless one is forced, either with
`with ztok_fast.backend("reference"):` or for the whole process with the environment variable `ZTOK_BACKEND`. A forced
backend that cannot run an op is an error: nothing falls back in silence.

The choice is made when the op runs, inside the registered custom op, so compiled code obeys it as well. The backward
pass of an op is an op of its own, `<op>_backward`, chosen when it runs: the block in which `.backward()` is called
decides for it, not the one in which the forward pass ran, and not the thread that autograd runs it in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from importlib import import_module

import torch

from ztok_fast.ops import requirements

from ztok_fast.ops.backends import BackendUnavailable, backend, forced_backend  # noqa: E402


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    width: int | None = None,
    argument_dtypes: Iterable[torch.dtype] = (),
    arguments: tuple | None = None,
) -> requirements.Requirement:
    """The row of the backend that runs an op on such input.

    Args:
        op: name of the op.
        device, dtype, width: those of the op's main tensor (its first argument, width = size of the last dimension).
        argument_dtypes: those of its other floating-point tensors.
        arguments: all that it is called with; None leaves out the rows' conditions on them.

    Raises:
        BackendUnavailable: no backend can, or the forced one cannot.
    """
    forced = forced_backend(op)
    rows = requirements.rows_of(op)
    needs = (device, dtype, width, argument_dtypes, forced is not None, arguments)
    for row in rows:
        if forced is None or row.backend == forced:
            if requirements.meets(row, *needs):
                return row
    refused = [
        f"{row.backend}: {'; '.join(requirements.unmet(row, *needs))}"
        for row in rows
        if forced is None or row.backend == forced
    ]
    if forced is not None:
        why = refused[0] if refused else f"{forced}: the op has no such backend"
        raise BackendUnavailable(f"{op}: the forced backend cannot run it ({why})")
    raise BackendUnavailable(f"{op}: no backend can run it ({' | '.join(refused)})")


@functools.cache
def load(implementation: str) -> Callable:
    """Import the function named "module:function"."""
    module, function = implementation.split(":")
    return getattr(import_module(module), function)


def call(op: str, main: torch.Tensor, *args, check: Callable[[], None] | None = None):
    """Run an op's chosen backend on `main` (which decides the choice) and the other arguments.

    `check` raises for values that the op refuses. It runs first, or, with a backend that looks at them itself, only
    after that has refused.
    """
    others = ()
    if requirements.looks_at_arguments(op):
        others = {a.dtype for a in args if isinstance(a, torch.Tensor) and a.dtype.is_floating_point}
    row = choose(op, main.device, main.dtype, main.shape[-1] if main.ndim > 1 else None, others, (main, *args))
    return run_row(row, check, main, *args)


def run_row(row: requirements.Requirement, check: Callable[[], None] | None, *args):
    """Run the backend of a row, with `check` as `call` says."""
    if check is None or not row.checks_values:
        if check is not None:
            check()
        return load(row.implementation)(*args)
    try:
        return load(row.implementation)(*args)
    except RuntimeError:
        check()
        raise


def call_contiguous(op: str, *args, check: Callable[[], None] | None = None):
    """`call` with every tensor made contiguous: what ops do whose backends read rows in place.

    Strided input is copied once here, and the results are laid out as the fake kernels say whatever came in.
    """
    return call(op, *[a.contiguous() if isinstance(a, torch.Tensor) else a for a in args], check=check)


# What an op's arguments may be for `run` to leave out its registration: tensor subclasses dispatch for themselves.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str))


def run(registered: torch._ops.OpOverload, kernel: Callable, *args):
    """Call a registered op, or in plain eager calls the function that it was registered with.

    The registration is there for autograd, `torch.compile`, `torch.func`, dispatch modes such as fake tensors, and
    tensor subclasses. Where none of them is at work it ends in `kernel` all the same, after 15 µs of Python, which a
    decode step has not to spare.
    """
    flat = args
    if list in map(type, args):
        flat = [item for a in args for item in (a if type(a) is list else (a,))]
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        and torch._C._any_requires_grad(*flat)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or not _PLAIN.issuperset(map(type, flat))
    ):
        return registered(*args)
    return kernel(*args)
