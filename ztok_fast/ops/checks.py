"""Argument checks shared by all op families.

Two kinds. Checks of shape, dtype and device run in the public functions and cost nothing on the device. Checks of
*values* (`cu_seqlens` that decrease, mass out of range) read the data: they run inside the registered op, on the CPU
always, elsewhere only when the environment variable `ZTOK_DEBUG_CHECKS` is set to something other than "0", because
there they synchronise.

Every failure is a `ValueError` of the form "<op>: <argument> must be <expected>, got <got>".
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any, NoReturn, TypeGuard

import torch

from ztok_fast.ops.backends import FLOATS

INDICES = (torch.int32, torch.int64)


def fail(op: str, argument: str, expected: str, got: object) -> NoReturn:
    """Raise the error that every check raises."""
    raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def describe(value: object) -> str:
    """Shape, dtype and device of a tensor, or the type and value of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


@functools.cache
def _dimensions(layout: str, rank: int) -> tuple[tuple[str, int], ...] | None:
    """(name, what is added to it) of each dimension, or None where the layout has another rank.

    The name of a number is "", that of a dimension that may have any size is "*".
    """
    for alternative in layout.split(" or "):
        names = alternative.strip("[]").split(", ")
        if names[-1] == "*":
            names = names[:-1] + ["*"] * (rank - len(names) + 1)
        if len(names) == rank:
            parts = [name.partition(" + ") for name in names]
            return tuple(
                ("", int(name)) if name.isdigit() else (name, int(more or 0)) if name.isidentifier() else ("*", 0)
                for name, _, more in parts
            )
    return None


class Arguments:
    """The tensors of one call of `op`: dimensions of one name have one size, and all are on the device of the first."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.given: dict[str, torch.Tensor] = {}
        self._sizes: dict[str, tuple[int, str]] = {}

    def tensor(
        self, argument: str, value: Any, layout: str, dtypes: tuple[torch.dtype, ...] | str = FLOATS, empty: bool = True
    ) -> None:
        """Check one.

        Args:
            layout: dimensions by name, such as "[M, d]", "[V, d] or [L, V, d]", "[B + 1]", "[T, 2]" or "[T, *]".
            dtypes: those that it may have, or the argument whose dtype it must have.
            empty: whether a dimension may have no element.
        """
        dimensions = _dimensions(layout, value.ndim) if isinstance(value, torch.Tensor) else None
        if dimensions is None:
            fail(self.op, argument, f"a tensor {layout}", describe(value))
        if isinstance(dtypes, str):
            if value.dtype != self.given[dtypes].dtype:
                fail(self.op, argument, f"of the dtype of {dtypes} ({self.given[dtypes].dtype})", describe(value))
        elif value.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))
            fail(self.op, argument, f"of dtype {names}", describe(value))
        for main, first in self.given.items():
            if not (value.is_cpu and first.is_cpu) and value.device != first.device:
                fail(self.op, argument, f"on the device of {main} ({first.device})", describe(value))
            break
        self.given[argument] = value
        if not empty and 0 in value.shape:
            fail(self.op, argument, "not empty", describe(value))
        for dim, ((name, more), size) in enumerate(zip(dimensions, value.shape)):
            if name == "*":
                continue
            if size == 0 and more and name:
                fail(self.op, argument, f"a tensor {layout} of at least one element", describe(value))
            wanted, of = self._sizes.setdefault(name, (size - more, argument)) if name else (0, "")
            if size != wanted + more:
                source = f" ({name} of {of})" if name else ""
                expected = f"of size {wanted + more} in dimension {dim} of {layout}{source}"
                fail(self.op, argument, expected, describe(value))

    def size(self, argument: str, dim: int, size: int, meaning: str) -> None:
        """A size that no layout says; `meaning` says where it comes from."""
        if self.given[argument].shape[dim] != size:
            expected = f"of size {size} in dimension {dim % self.given[argument].ndim} ({meaning})"
            fail(self.op, argument, expected, describe(self.given[argument]))


def check_choice(op: str, argument: str, value: object, choices: tuple[str, ...]) -> None:
    """One of some strings."""
    if value not in choices:
        fail(op, argument, f"one of {', '.join(map(repr, choices))}", repr(value))


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number of Python, which a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_positive(op: str, argument: str, value: object) -> None:
    """A finite number above zero."""
    if not is_number(value) or not 0 < value < math.inf:
        fail(op, argument, "a finite number above 0", repr(value))


def check_count(op: str, argument: str, value: object) -> None:
    """An integer of at least zero."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 0:
        fail(op, argument, "an integer of at least 0", repr(value))


def value_checks(value: torch.Tensor) -> bool:
    """Whether values on this tensor's device are to be checked."""
    return value.device.type == "cpu" or os.environ.get("ZTOK_DEBUG_CHECKS", "0") not in ("", "0")


def check_range_values(op: str, argument: str, value: torch.Tensor, low: int, high: int, expected: str) -> None:
    """Integers in [low, high]; `expected` says so with what the bounds mean."""
    if value.numel() == 0 or not value_checks(value):
        return
    if value.numel() <= 64:  # a list of Python integers is cheaper than three tensor ops
        values = value.flatten().tolist()
        least, greatest = min(values), max(values)
    else:
        least, greatest = (int(v) for v in value.aminmax())
    if least < low or greatest > high:
        fail(op, argument, expected, least if least < low else greatest)


def check_cu_seqlens_values(
    op: str,
    argument: str,
    cu_seqlens: torch.Tensor,
    total: int,
    exact: bool = True,
    max_length: int | None = None,
    limit: str = "",
) -> None:
    """First 0, non-decreasing, last = number of packed rows, or with `exact` False at most that.

    With `max_length` also no sequence longer than that; `limit` says where it comes from.
    """
    if not value_checks(cu_seqlens):
        return
    first, last, shortest, longest = _offset_summary(cu_seqlens)
    if first != 0:
        fail(op, argument, "0 in its first element", first)
    if shortest < 0:
        values = cu_seqlens.tolist()
        i = next(i for i in range(1, len(values)) if values[i] < values[i - 1])
        fail(op, argument, "non-decreasing", f"{values[i - 1]} followed by {values[i]} at index {i}")
    if exact and last != total:
        fail(op, argument, f"{total} in its last element (the number of packed rows)", last)
    if last > total:
        fail(op, argument, f"at most {total} in its last element (the capacity)", last)
    if max_length is not None and longest > max_length:
        fail(op, argument, f"of sequences of at most {max_length} rows ({limit})", f"one of {longest}")


def _offset_summary(cu_seqlens: torch.Tensor) -> tuple[int, int, int, int]:
    """First, last, length of the shortest and of the longest sequence (0 without any)."""
    if cu_seqlens.shape[0] <= 64:  # a list of Python integers is cheaper than five tensor ops
        values = cu_seqlens.tolist()
        lengths = [end - begin for begin, end in zip(values, values[1:])] or [0]
        return values[0], values[-1], min(lengths), max(lengths)
    shortest, longest = cu_seqlens.long().diff().aminmax()
    return int(cu_seqlens[0]), int(cu_seqlens[-1]), int(shortest), int(longest)


def check_finite_values(op: str, argument: str, value: torch.Tensor) -> None:
    """No NaN and no infinity."""
    if not value_checks(value):
        return
    # A sum is finite only if everything in it is, and takes one pass without temporaries. One that is not may have
    # overflowed, which the exact test tells.
    if not math.isfinite(value.sum(dtype=compute_dtype(value)).item()) and not bool(torch.isfinite(value).all()):
        fail(op, argument, "finite", "NaN or infinity in it")


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype an op accumulates in: float64 when any of its tensors is float64, float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
