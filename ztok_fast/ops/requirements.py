"""What each backend of each op needs: one table that drives dispatch, error messages, test skips and the doctor.

A new backend of an op is one module in the family's folder and one row in `REQUIREMENTS`. Rows of an op stand in order
of preference; the first one whose needs are met is chosen. The backward pass of an op is an op of its own with rows of
its own, `<op>_backward`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
UP_TO_FLOAT32 = FLOATS[:3]
ANY_DTYPE = (*FLOATS, *INTEGERS, torch.bool)


@dataclass(frozen=True)
class Arguments:
    """What a backend asks of an op's arguments beyond dtypes and widths.

    Attributes:
        text: the condition, to be read after "where".
        holds: takes the op's arguments; whether they meet it. It must not look at the values of tensors.
    """

    text: str
    holds: Callable[..., bool]


@dataclass(frozen=True)
class Requirement:
    """One backend of one op and what it needs. `None` means no limit.

    Attributes:
        op: name of the op, as in `torch.ops.ztok`.
        backend: name given to `ztok_fast.backend` and `ZTOK_BACKEND`.
        implementation: "module:function", imported on first use; the function takes the op's arguments.
        device_types: torch device types that it runs on. Triton kernels run on others too where they are interpreted.
        dtypes: dtypes of the op's main tensor (its first argument).
        argument_dtypes: dtypes of the op's other floating-point tensors.
        max_width: largest width (size of the last dimension) of the main tensor.
        min_compute_capability: lowest CUDA compute capability (major, minor).
        library: name in `LIBRARIES` of what must be present.
        arguments: what else it asks of the op's arguments.
        max_rows: most rows (size of the first dimension) of the main tensor, for kernels made for few; with more of
            them the next backend that can is chosen, which is how an op is dispatched by shape.
        checks_values: it looks at the values of its arguments itself, while it reads them, and raises a RuntimeError
            for those that the op refuses; the op's own checks, which say what is wrong, then run only after that.
    """

    op: str
    backend: str
    implementation: str
    device_types: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    argument_dtypes: tuple[torch.dtype, ...] | None = None
    max_width: int | None = None
    min_compute_capability: tuple[int, int] | None = None
    library: str | None = None
    arguments: Arguments | None = None
    max_rows: int | None = None
    checks_values: bool = False


OLDEST_TRITON = (3, 6)


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


def _interpreted(row: Requirement) -> bool:
    return row.library == "triton" and triton_is_interpreted()


def runs_on(row: Requirement, device_type: str) -> bool:
    """Whether a backend runs on a kind of device at all."""
    return row.device_types is None or device_type in row.device_types or _interpreted(row)


@functools.cache  # the library is loaded, or not, once
def _cpu_library_missing() -> str | None:
    from ztok_fast import native  # imported here because it loads compiled code

    part = native.status("cpu")
    return None if part.available else f"the compiled CPU library is not available ({part.reason})"


def _cuda_library_missing() -> str | None:
    from ztok_fast import native

    part = native.status("cuda")
    return None if part.available else f"the compiled CUDA library is not available ({part.reason})"


# name -> function that returns None when the library is present and otherwise why it is not
LIBRARIES: dict[str, Callable[[], str | None]] = {
    "triton": _triton_missing,
    "cpu": _cpu_library_missing,
    "cuda": _cuda_library_missing,
}


def _reference(op: str, family: str, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Requirement:
    return Requirement(op, "reference", f"ztok_fast.ops.{family}.reference:{op}", dtypes=dtypes)


def _cpp(op: str, family: str, dtypes: tuple[torch.dtype, ...] = FLOATS, **needs) -> Requirement:
    return Requirement(op, "cpp", f"ztok_fast.ops.{family}.cpp:{op}", ("cpu",), dtypes, library="cpu", **needs)


def _triton(op: str, family: str, module: str = "triton", **needs) -> Requirement:
    needs = {"dtypes": UP_TO_FLOAT32, "argument_dtypes": UP_TO_FLOAT32, "min_compute_capability": (8, 0), **needs}
    return Requirement(op, "triton", f"ztok_fast.ops.{family}.{module}:{op}", ("cuda",), library="triton", **needs)


def _cuda(op: str, family: str, dtypes: tuple[torch.dtype, ...] = FLOATS, **needs) -> Requirement:
    implementation = f"ztok_fast.ops.{family}.cuda:{op}"
    return Requirement(
        op, "cuda", implementation, ("cuda",), dtypes, min_compute_capability=(8, 0), library="cuda", **needs
    )


REQUIREMENTS: tuple[Requirement, ...] = ()


def ops() -> tuple[str, ...]:
    """Names of all ops in the table, in its order."""
    return tuple(dict.fromkeys(row.op for row in REQUIREMENTS))


def backends() -> tuple[str, ...]:
    """Names of all backends in the table, in its order."""
    return tuple(dict.fromkeys(row.backend for row in REQUIREMENTS))


# The rows of each op, and the ops of which some row has a need of the other arguments, gathered from the table that is
# named first: asked for at every call of an op.
_gathered: tuple[tuple[Requirement, ...], dict[str, tuple[Requirement, ...]], frozenset[str]] = ((), {}, frozenset())


def _gather() -> tuple[tuple[Requirement, ...], dict[str, tuple[Requirement, ...]], frozenset[str]]:
    global _gathered
    if _gathered[0] is not REQUIREMENTS:
        by_op = {name: tuple(row for row in REQUIREMENTS if row.op == name) for name in ops()}
        looking = frozenset(row.op for row in REQUIREMENTS if row.argument_dtypes is not None)
        _gathered = (REQUIREMENTS, by_op, looking)
    return _gathered


def rows_of(op: str) -> tuple[Requirement, ...]:
    """The rows of one op, preferred backend first.

    Raises:
        KeyError: the table has no such op.
    """
    by_op = _gather()[1]
    if op not in by_op:
        raise KeyError(f"no op named {op!r}; the table has {', '.join(ops())}")
    return by_op[op]


def looks_at_arguments(op: str) -> bool:
    """Whether some row of an op has a need of the dtypes of the arguments beside the main tensor."""
    return op in _gather()[2]


def _needs_not_met(
    row: Requirement,
    device: torch.device,
    dtype: torch.dtype | None,
    width: int | None,
    argument_dtypes: Iterable[torch.dtype],
    forced: bool,
    arguments: tuple | None,
) -> Iterator[str]:
    """Cheapest needs first, so that a row is refused for its device before a library is looked for."""
    if not runs_on(row, device.type):
        hint = ", where only Triton's interpreter runs it (TRITON_INTERPRET=1)" if row.library == "triton" else ""
        yield f"runs on {' or '.join(row.device_types)}, not on {device.type}{hint}"
    elif not forced and _interpreted(row):
        yield "is run by Triton's interpreter here (TRITON_INTERPRET), which is for tests: only if it is forced"
    if dtype is not None and dtype not in row.dtypes:
        yield f"takes {', '.join(str(d) for d in row.dtypes)}, not {dtype}"
    if row.argument_dtypes is not None:
        others = sorted({str(d) for d in argument_dtypes if d not in row.argument_dtypes})
        if others:
            allowed = ", ".join(str(d) for d in row.argument_dtypes)
            yield f"takes {allowed} beside the main tensor, not {', '.join(others)}"
    if width is not None and row.max_width is not None and width > row.max_width:
        yield f"takes a width of at most {row.max_width}, not {width}"
    if row.arguments is not None and arguments is not None and not row.arguments.holds(*arguments):
        yield f"runs only where {row.arguments.text}"
    if row.max_rows is not None and arguments is not None and arguments[0].shape[0] > row.max_rows:
        yield f"takes at most {row.max_rows} rows, not {arguments[0].shape[0]}"
    if row.min_compute_capability is not None and device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < row.min_compute_capability:
            yield (
                f"needs compute capability {'.'.join(map(str, row.min_compute_capability))}, "
                f"the device has {'.'.join(map(str, capability))}"
            )
    if row.library is not None:
        missing = LIBRARIES[row.library]()
        if missing is None and forced and _interpreted(row):
            missing = _interpreter_fails()
        if missing is not None:
            yield missing


def unmet(
    row: Requirement,
    device: torch.device,
    dtype: torch.dtype | None = None,
    width: int | None = None,
    argument_dtypes: Iterable[torch.dtype] = (),
    forced: bool = False,
    arguments: tuple | None = None,
) -> list[str]:
    """Why a backend cannot run here, one plain phrase per need that is not met; empty when it can.

    `dtype` and `width` describe the main tensor; None leaves a need out (what the doctor and the tests do).
    `argument_dtypes` are those of the other floating-point tensors. `forced` says that the backend was asked for by
    name; interpreted kernels run only then. `arguments` are all that the op was called with.
    """
    return list(_needs_not_met(row, device, dtype, width, argument_dtypes, forced, arguments))


def meets(
    row: Requirement,
    device: torch.device,
    dtype: torch.dtype | None = None,
    width: int | None = None,
    argument_dtypes: Iterable[torch.dtype] = (),
    forced: bool = False,
    arguments: tuple | None = None,
) -> bool:
    """Whether a backend can run here; stops at the first need that is not met."""
    return next(_needs_not_met(row, device, dtype, width, argument_dtypes, forced, arguments), None) is None
