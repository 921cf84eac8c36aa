"""Backends: what each needs, which of them runs, and how to force one.

An op (`ztok_fast.ops.op.Op`) lists its backends in order of preference, the plain PyTorch reference last; the first one
whose needs are met runs. `with ztok_fast.backend("reference"):` forces one in the current thread, the environment
variable `ZTOK_BACKEND`, read when the package is imported, in the whole process. A forced backend that cannot run an op
is an error: nothing falls back in silence.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
UP_TO_FLOAT32 = FLOATS[:3]
ANY_DTYPE = (*FLOATS, *INTEGERS, torch.bool)
NAMES = ("cpp", "cuda", "triton", "reference")
OLDEST_TRITON = (3, 6)


class BackendUnavailable(ValueError):
    """No backend, or not the forced one, can run an op on the given input; the message says why for each."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op and what it needs. `None` means no limit.

    Attributes:
        name: one of `NAMES`.
        implementation: "module:function", imported on first use, or the function; it takes the arguments of the
            registered op, whose CUDA device, if any, is the current one. None: a compiled library registers it under
            the op's own name for `device_type`.
        device_type: torch device type that it runs on. Interpreted Triton kernels run on the CPU too.
        dtypes: floating-point dtypes of the op's tensors; other tensors are the op's own checks' concern.
        library: name in `LIBRARIES` of what must be present.
        min_capability: lowest CUDA compute capability (major, minor).
        condition: (text to be read after "where", function of the op's arguments that must not look at the values of
            tensors): how an op is dispatched by shape.
        checks_values: it looks at the values of its arguments while it reads them and raises a RuntimeError for those
            that the op refuses; the op's own checks, which say what is wrong, then run only after that.
        contiguous: its tensors are made contiguous first. Compiled kernels see to that themselves.
    """

    name: str
    implementation: str | Callable | None = None
    device_type: str | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    library: str | None = None
    min_capability: tuple[int, int] | None = None
    condition: tuple[str, Callable[..., bool]] | None = None
    checks_values: bool = False
    contiguous: bool = False

    @property
    def compiled(self) -> bool:
        """Whether a compiled library registers it with torch's dispatcher."""
        return self.implementation is None

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs it here."""
        return self.library == "triton" and triton_is_interpreted()

    def runs_on(self, device_type: str) -> bool:
        """Whether it runs on a kind of device at all."""
        return self.device_type in (None, device_type) or self.interpreted

    def unmet(
        self, device: torch.device, dtypes: Iterable[torch.dtype] = (), forced: bool = False, args: tuple | None = None
    ) -> Iterator[str]:
        """Why it cannot run here, a plain phrase per need that is not met; cheapest needs first.

        Args:
            device: device of the op's tensors.
            dtypes: those of its floating-point tensors.
            forced: it was asked for by name; interpreted kernels run only then.
            args: what the op was called with; None leaves out the condition on it.
        """
        if not self.runs_on(device.type):
            hint = ", where only Triton's interpreter runs it (TRITON_INTERPRET=1)" if self.library == "triton" else ""
            yield f"runs on {self.device_type}, not on {device.type}{hint}"
        elif not forced and self.interpreted:
            yield "is run by Triton's interpreter here (TRITON_INTERPRET), which is for tests: only if it is forced"
        for dtype in dict.fromkeys(dtypes):
            if dtype not in self.dtypes:
                yield f"takes {', '.join(map(str, self.dtypes))}, not {dtype}"
        if self.condition is not None and args is not None and not self.condition[1](*args):
            yield f"runs only where {self.condition[0]}"
        if self.min_capability is not None and device.type == "cuda" and torch.cuda.is_available():
            capability = torch.cuda.get_device_capability(device)
            if capability < self.min_capability:
                needed, present = (".".join(map(str, c)) for c in (self.min_capability, capability))
                yield f"needs compute capability {needed}, the device has {present}"
        if self.library is not None:
            missing = LIBRARIES[self.library]()
            if missing is None and forced and self.interpreted:
                missing = _interpreter_fails()
            if missing is not None:
                yield missing


def cpp(dtypes: tuple[torch.dtype, ...] = FLOATS, **needs) -> Backend:
    """The kernel of the compiled CPU library (`csrc/cpu`)."""
    return Backend("cpp", None, "cpu", dtypes, "cpu", **needs)


def cuda(dtypes: tuple[torch.dtype, ...] = FLOATS, **needs) -> Backend:
    """The kernel of the compiled CUDA library (`csrc/cuda`)."""
    return Backend("cuda", None, "cuda", dtypes, "cuda", (8, 0), **needs)


def triton(
    implementation: str, dtypes: tuple[torch.dtype, ...] = UP_TO_FLOAT32, contiguous: bool = True, **needs
) -> Backend:
    """A Triton kernel, `implementation` = "module:function" with a module below `ztok_fast.ops`."""
    name = f"ztok_fast.ops.{implementation}"
    return Backend("triton", name, "cuda", dtypes, "triton", (8, 0), contiguous=contiguous, **needs)


# --- what backends need


@functools.cache
def _triton_missing() -> str | None:
    if not importlib.util.find_spec("triton"):
        return "the package triton is not installed"
    version = metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {'.'.join(map(str, OLDEST_TRITON))} or newer is needed, {version} is installed"
    return None


def triton_is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: on any device, for tests, and very slowly.

    Triton decides when a kernel's module is first imported, by the environment variable that is asked for here.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _interpreter_fails() -> str | None:
    """Why Triton's interpreter cannot run the kernels; compiled kernels are not concerned."""
    version, numpy = metadata.version("triton"), metadata.version("numpy")
    if version.startswith("3.6.") and tuple(int(part) for part in numpy.split(".")[:2]) >= (2, 4):
        return f"the interpreter of triton {version} runs no loops with numpy 2.4 and newer, {numpy} is installed"
    return None


def _compiled_library_missing(part: str) -> str | None:
    from ztok_fast import native  # imported here because it loads compiled code

    status = native.status(part)
    return None if status.available else f"the compiled {part.upper()} library is not available ({status.reason})"


LIBRARIES: dict[str, Callable[[], str | None]] = {
    "triton": _triton_missing,
    "cpu": functools.partial(_compiled_library_missing, "cpu"),
    "cuda": functools.partial(_compiled_library_missing, "cuda"),
}
"""Name -> function that returns None when the library is present and otherwise why it is not."""


# --- forcing one


class _Forced(threading.local):
    # op -> backend, the key None standing for every op not named; blocks replace it
    by_op: dict[str | None, str] = {None: os.environ["ZTOK_BACKEND"]} if os.environ.get("ZTOK_BACKEND") else {}


_forced = _Forced()


def forced_backends() -> dict[str | None, str]:
    """What the innermost `backend` block of this thread forces: op -> backend, None standing for all others."""
    return _forced.by_op


def forced_backend(op: str) -> str | None:
    """The backend forced for an op by the innermost `backend` block or else by `ZTOK_BACKEND`; None when free."""
    forced = _forced.by_op
    if not forced:
        return None
    name = forced.get(op) or forced.get(None)
    if name is not None and name not in NAMES:  # a block checks its own
        _check_name(name, "ZTOK_BACKEND")
    return name


@contextmanager
def forcing(by_op: dict[str | None, str]) -> Iterator[None]:
    """Replace all that is forced in this thread, as the backward pass does with what its forward pass saw."""
    outer, _forced.by_op = _forced.by_op, by_op
    try:
        yield
    finally:
        _forced.by_op = outer


@contextmanager
def backend(name: str, ops: Iterable[str] | None = None) -> Iterator[None]:
    """Force a backend inside the `with` block, in the current thread.

    The choice holds for the backward passes of what is called in the block as well, wherever they run. Code given to
    `torch.compile` chooses when it runs, so that one compiled function obeys different blocks; its backward pass obeys
    the block in which it is compiled, if any, or else the one in which it runs.

    Args:
        name: "cpp", "cuda", "triton" or "reference".
        ops: names of the ops it is forced for, with their backward passes; None forces it for all. Blocks nest: the
            inner one decides for the ops it names.

    Raises:
        ValueError: no such backend or op.

    Inside the block an op, or a backward pass, that this backend cannot run raises `BackendUnavailable`; another one
    can be forced for it: `backend("reference", ops=["codebook_assign_backward"])`.
    """
    from ztok_fast.ops.op import OPS

    _check_name(name, "backend: name")
    if ops is None:
        forced: dict[str | None, str] = {None: name}
    else:
        forced = dict(_forced.by_op)
        for op in ops:
            if op not in OPS and not hasattr(torch.ops.ztok, op):
                raise ValueError(f"backend: ops must name ops of {', '.join(OPS)}, got {op!r}")
            forced[op] = forced[f"{op}_backward"] = name
    with forcing(forced):
        yield


def _check_name(name: str, source: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")


@functools.cache
def load(implementation: str | Callable) -> Callable:
    """Import the function named "module:function"; a function is itself."""
    if not isinstance(implementation, str):
        return implementation
    module, function = implementation.split(":")
    return getattr(import_module(module), function)
