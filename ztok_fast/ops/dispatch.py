"""Which backend runs an op.

The preferred backend whose row in `ztok_fast.ops.requirements` is satisfied runs, unless one is forced, either with
`with ztok_fast.backend("reference"):` or for the whole process with the environment variable `ZTOK_BACKEND`. A forced
backend that cannot run an op is an error: nothing falls back in silence.

The choice is made when the op runs, inside the registered custom op, so compiled code obeys it as well. The backward
pass of an op is an op of its own, `<op>_backward`, chosen when it runs: the block in which `.backward()` is called
decides for it, not the one in which the forward pass ran, and not the thread that autograd runs it in.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module

import torch

from ztok_fast.ops import requirements

# Where the forced backends are kept: op -> backend, the key None standing for every op not named. In the thread-local
# objects of torch and not in a ContextVar, because autograd takes those along into the threads that run the backward
# passes of a GPU.
_FORCED = "ztok_forced_backend"


def _stash_takes_a_reference() -> bool:
    """Whether torch counts a reference to what it stores. torch 2.11 does not, and gives up one that it never had."""
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls("ztok_probe", probe)
    counted = sys.getrefcount(probe) > before
    if not counted:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))
    return counted


_STASH_TAKES_A_REFERENCE = _stash_takes_a_reference()


def _stash(forced: dict[str | None, str]) -> None:
    if not _STASH_TAKES_A_REFERENCE:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(forced))
    torch._C._stash_obj_in_tls(_FORCED, forced)


def _forced() -> dict[str | None, str]:
    return torch._C._get_obj_in_tls(_FORCED) if torch._C._is_key_in_tls(_FORCED) else {}


class BackendUnavailable(ValueError):
    """No backend, or not the forced one, can run an op on the given input; the message says why for each."""


def _check_backend_name(name: str, source: str) -> None:
    known = requirements.backends()
    if name not in known:
        raise ValueError(f"{source} must be one of {', '.join(known)}, got {name!r}")


@contextmanager
def backend(name: str, ops: Iterable[str] | None = None) -> Iterator[None]:
    """Force a backend inside the `with` block, in the current thread.

    Args:
        name: a backend of the requirements table, for example "reference".
        ops: names of the ops it is forced for, with their backward passes; None forces it for all. Blocks nest: the
            inner one decides for the ops it names.

    Raises:
        ValueError: the backend or an op is not in the table.

    Inside the block an op, or a backward pass, that this backend cannot run raises `BackendUnavailable`; another backend
    can be forced for that one: `backend("reference", ops=["codebook_assign_backward"])`. Enter the block outside of code
    given to `torch.compile`.
    """
    _check_backend_name(name, "backend: name")
    if ops is None:
        forced: dict[str | None, str] = {None: name}
    else:
        forced = dict(_forced())
        for op in ops:
            if op not in requirements.ops():
                raise ValueError(f"backend: ops must name ops of {', '.join(requirements.ops())}, got {op!r}")
            forced[op] = forced[f"{op}_backward"] = name
    outer = _forced()
    _stash(forced)
    try:
        yield
    finally:
        _stash(outer)


def forced_backend(op: str) -> str | None:
    """The backend forced for an op by the innermost `backend` block or else by `ZTOK_BACKEND`; None when free."""
    forced = _forced()
    if op in forced:
        return forced[op]
    if None in forced:
        return forced[None]
    name = os.environ.get("ZTOK_BACKEND")
    if not name:
        return None
    _check_backend_name(name, "ZTOK_BACKEND")
    return name


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
