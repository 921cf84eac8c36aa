"""Everything that is benchmarked, by name, and the choice of cases."""

from __future__ import annotations

from itertools import zip_longest

from bench import engine
from bench.baselines import halting, lora, nearest, quantize, ragged, zhead
from bench.codec import runs
from bench.subject import OpSubject, Subject
from ztok_fast.ops import op as ops
from ztok_fast.ops.spec import SETS, Case

_COMPARED = {
    subject.name: subject for module in (nearest, quantize, halting, zhead, ragged, lora) for subject in module.SUBJECTS
}
OPS: dict[str, Subject] = {
    name: _COMPARED.get(name, OpSubject(name, ()))
    for name, op in ops.OPS.items()
    if op.spec is not None and op.spec.cases
}
"""Every op that declares cases, also where there is nothing to compare it with."""
RUNS: dict[str, Subject] = {run.name: run for run in (runs.COMPRESS, runs.DECOMPRESS)}
"""Runs of the whole codec; measured when they are named."""
PASSES: dict[str, Subject] = {subject.name: subject for subject in (engine.PREFILL, engine.STEP)}
"""Passes of the engine; measured when they are named."""

Chosen = list[tuple[Subject, Case]]


def in_set(case: Case, chosen: str) -> bool:
    """Whether a set has a case: `tiny` only its own, each other one those of the smaller ones as well."""
    if "tiny" in (chosen, case.set):
        return case.set == chosen
    return SETS.index(case.set) <= SETS.index(chosen)


def interleave(cases: Chosen) -> Chosen:
    """The first case of every op, then the second of every op, and so on: for runs that may be cut short."""
    of_op: dict[str, Chosen] = {}
    for pair in cases:
        of_op.setdefault(pair[0].name, []).append(pair)
    return [pair for own in zip_longest(*of_op.values()) for pair in own if pair is not None]


def select(ops: list[str] | None, chosen: str, device_type: str, contains: list[str] | None = None) -> Chosen:
    """Cases of the named ops and runs (None: all ops) in a set for a device type.

    Args:
        contains: keep only cases whose key contains one of these texts.

    Raises:
        ValueError: an op or set that there is not.
    """
    if chosen not in SETS:
        raise ValueError(f"set: expected one of {', '.join(SETS)}, got {chosen!r}")
    subjects = {**OPS, **RUNS, **PASSES}
    for name in ops or ():
        if name not in subjects:
            raise ValueError(f"ops: expected some of {', '.join(subjects)}, got {name!r}")
    return [
        (subjects[name], case)
        for name in ops or OPS
        for case in subjects[name].cases
        if in_set(case, chosen)
        and device_type in case.devices
        and (not contains or any(text in subjects[name].key(case) for text in contains))
    ]
