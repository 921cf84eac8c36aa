"""The registry: every op that is benchmarked, by the name it has in the requirements table."""

from __future__ import annotations

from itertools import zip_longest

from bench.codec import runs
from bench.micro import halting, lora, nearest, quantize, ragged, zhead
from bench.micro.case import SETS, Case, Op

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        nearest.OP,
        quantize.RESIDUAL,
        halting.OP,
        quantize.RAGGED,
        zhead.OP,
        ragged.PACK,
        ragged.UNPACK,
        ragged.GATHER,
        lora.OP,
    )
}

RUNS: dict[str, Op] = {op.name: op for op in (runs.COMPRESS, runs.DECOMPRESS)}
"""Runs of the whole codec; measured when they are named."""


def entry(name: str) -> Op:
    """An op or a run of the whole codec by its name."""
    return OPS[name] if name in OPS else RUNS[name]


def in_set(case: Case, chosen: str) -> bool:
    """Whether a set has a case: `tiny` only its own, each other one those of the smaller ones as well."""
    if "tiny" in (chosen, case.set):
        return case.set == chosen
    return SETS.index(case.set) <= SETS.index(chosen)


def interleave(cases: list[Case]) -> list[Case]:
    """The first case of every op, then the second of every op, and so on: for runs that may be cut short."""
    of_op: dict[str, list[Case]] = {}
    for case in cases:
        of_op.setdefault(case.op, []).append(case)
    rounds = zip_longest(*of_op.values())
    return [case for own in rounds for case in own if case is not None]


def select(ops: list[str] | None, chosen: str, device_type: str, contains: list[str] | None = None) -> list[Case]:
    """Cases of the named ops and runs (None: all ops) in a set for a device type.

    Args:
        contains: keep only cases whose key contains one of these texts.

    Raises:
        ValueError: an op or set that there is not.
    """
    if chosen not in SETS:
        raise ValueError(f"set: expected one of {', '.join(SETS)}, got {chosen!r}")
    for name in ops or ():
        if name not in OPS and name not in RUNS:
            raise ValueError(f"ops: expected some of {', '.join((*OPS, *RUNS))}, got {name!r}")
    return [
        case
        for name in ops or OPS
        for case in entry(name).cases
        if in_set(case, chosen)
        and device_type in case.devices
        and (not contains or any(text in case.key for text in contains))
    ]
