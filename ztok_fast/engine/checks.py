"""Checks of the engine's arguments. Errors say what was expected and what came."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ztok_fast.engine.architecture import EngineUnsupported


def processor() -> None:
    """Refuse an x86 processor without FMA: the arithmetic there is the same, but far too slow to be of use.

    Raises:
        EngineUnsupported: the kernels in use are those without AVX2 and FMA.
    """
    if platform.machine().lower() in ("x86_64", "amd64") and torch.ops.ztok.isa_native(-1) == 0:
        raise EngineUnsupported("engine: processor: expected AVX2 and FMA, and kernels built for them, got none")


def integer(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"engine: {name}: expected an integer of at least {least}, got {value!r}")
    return value


def tensor(
    name: str, value: object, shape: tuple[int | None, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """A tensor of this dtype and shape on a device; None stands for any size."""
    device = torch.device(device)
    if isinstance(value, Tensor) and value.dtype == dtype and value.device == device and len(shape) == value.ndim:
        if all(size is None or size == there for size, there in zip(shape, value.shape)):
            return
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    got = (
        f"{_name(value.dtype)} {list(value.shape)} on {value.device}"
        if isinstance(value, Tensor)
        else f"{type(value).__name__} {value!r}"
    )
    raise ValueError(f"engine: {name}: expected a tensor {_name(dtype)} [{sizes}] on {device}, got {got}")


def sampling(temperature: Any, top_p: Any, seed: Any, least: str = "above 0") -> None:
    """`least` "at least 0" lets the temperature be 0."""
    if not _is_number(temperature) or not (0 < temperature or temperature == 0 and least != "above 0"):
        raise ValueError(f"engine: temperature: expected a finite number {least}, got {temperature!r}")
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise ValueError(f"engine: top_p: expected a number above 0 and at most 1, got {top_p!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"engine: seed: expected an integer of 64 bits, got {seed!r}")


def prompts(values: object, vocabulary: int) -> list[Tensor]:
    """Prompts as int64 tensors, one dimension each, not empty, of tokens that the model has."""
    if not isinstance(values, (list, tuple)) and not (isinstance(values, Tensor) and values.ndim == 2):
        raise ValueError(f"engine: prompts: expected a list of token sequences, got {type(values).__name__}")
    return [_prompt(f"prompts[{i}]", value, vocabulary) for i, value in enumerate(values)]


def _prompt(name: str, value: object, vocabulary: int) -> Tensor:
    if isinstance(value, Tensor):
        if value.ndim != 1 or value.dtype not in (torch.int64, torch.int32) or value.device.type != "cpu":
            got = f"{_name(value.dtype)} {list(value.shape)} on {value.device}"
            raise ValueError(f"engine: {name}: expected int64 [n] on cpu, got {got}")
        row = value.long()
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for token in value:
            if isinstance(token, bool) or not isinstance(token, int):
                raise ValueError(f"engine: {name}: expected token ids, got {type(token).__name__} {token!r} among them")
        try:
            row = torch.tensor(list(value), dtype=torch.int64)
        except (OverflowError, RuntimeError, ValueError):
            raise ValueError(f"engine: {name}: expected tokens from 0 to {vocabulary - 1}, got larger ones") from None
    else:
        raise ValueError(f"engine: {name}: expected a sequence of token ids, got {type(value).__name__}")
    if not len(row):
        raise ValueError(f"engine: {name}: expected at least one token, got none")
    lowest, highest = row.aminmax()
    if lowest < 0 or highest >= vocabulary:
        wrong = int(lowest if lowest < 0 else highest)
        raise ValueError(f"engine: {name}: expected tokens from 0 to {vocabulary - 1}, got {wrong}")
    return row


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
