"""One case: make its inputs, verify every implementation, time those that are right."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

import ztok_fast
from bench import results
from bench.machine import last_cache_bytes
from bench.subject import Baseline, OpSubject, Subject, short
from bench.timing import Call, Timed, graph_of, take_turns
from ztok_fast.ops.backends import BackendUnavailable
from ztok_fast.ops.op import OPS
from ztok_fast.ops.spec import BACKWARD, Case, Work

SLOW_CALL_SECONDS = 3.0
"""The reference is skipped, with that reason, where the guess for one call is longer."""
REFERENCE_GFLOPS = {"cpu": 30.0, "cuda": 10_000.0}
"""Rough speed of the reference, for that guess alone."""
MAX_INPUT_SETS = 64
OURS = "ours"
"""Name of a run of the whole codec among its implementations."""
MIN_ROUNDS, MIN_ROUNDS_WHOLE = 5, 3
"""Rounds that are timed whatever they take; a round of whole runs takes seconds."""


@dataclass
class Implementation:
    """A backend, baseline or mark on its way from the registry to the results."""

    name: str
    kind: str  # "backend" or the kind of a baseline
    status: str = "ok"
    reason: str | None = None
    checked: bool = False
    default: bool = False
    calls: list[Call] = field(default_factory=list)
    context: object = contextlib.nullcontext
    with_backends: dict[str, str] = field(default_factory=dict)
    threads: int | None = None  # of its own, where each implementation has the number that it is faster with
    baseline: Baseline | None = None

    def drop(self, status: str, reason: str) -> None:
        self.status, self.reason, self.calls = status, reason, []

    def as_dict(self) -> dict:
        entry = {name: getattr(self, name) for name in ("name", "kind", "status", "reason", "checked")}
        if self.kind == "backend":
            entry |= {"default": self.default, "with": self.with_backends}
        return entry | ({} if self.threads is None else {"threads": self.threads})


def backends_of(subject: Subject, case: Case, sets: Sequence, device, chosen: Sequence[str] | None = None):
    """One implementation per backend of the op, in order of preference; of a run of the whole codec the run alone.

    Args:
        chosen: names to keep; None keeps all.
    """
    calls = [functools.partial(subject.run, case, inputs) for inputs in sets]
    if not isinstance(subject, OpSubject):
        ours = Implementation(OURS, "backend", default=True, calls=calls)
        # a library that is missing or stale leaves the reference: that must be seen in the results
        ours.with_backends = {name: own[0] for name in subject.companions if (own := _available(name, device))}
        return [ours] if chosen is None or OURS in chosen else []
    arguments = subject.arguments(sets[0])
    try:
        default = subject.op.choose(arguments).name
    except BackendUnavailable:
        default = None
    found = []
    for backend in subject.op.backends:
        if chosen is not None and backend.name not in chosen:
            continue
        own = Implementation(backend.name, "backend", default=backend.name == default, calls=calls)
        found.append(own)
        floats = [t.dtype for t in arguments if isinstance(t, torch.Tensor) and t.is_floating_point()]
        reasons = list(backend.unmet(device, floats, True, arguments))
        guess = subject.work(case, sets[0]).flops * subject.op.spec.flops_of_reference
        guess /= REFERENCE_GFLOPS[device.type] * 1e9
        if backend.interpreted:
            own.drop("skipped", "interpreted Triton is for tests and is not timed")
        elif reasons:
            own.drop("skipped", "; ".join(reasons))
        elif backend.name == "reference" and guess > SLOW_CALL_SECONDS:
            own.drop("skipped", f"a call would take about {guess:.0f} s")
        else:
            forced = {}
            for name in (subject.name, f"{subject.name}_backward", *subject.companions):
                if available := _available(name, device):
                    forced[name] = own.name if own.name in available else available[0]
            if case.direction == BACKWARD:
                # what runs there instead, so that a reader knows what was timed
                own.with_backends = {other: used for other, used in forced.items() if used != own.name}
            own.context = functools.partial(_forcing, forced)
    return found


def _available(op: str, device: torch.device) -> list[str]:
    """Backends of an op whose needs are met here."""
    if op not in OPS:
        return []
    return [b.name for b in OPS[op].backends if next(b.unmet(device, (torch.float32,)), None) is None]


@contextlib.contextmanager
def _forcing(forced: dict[str, str]):
    with contextlib.ExitStack() as stack:
        for op, backend in forced.items():  # the op before its backward, which it would force as well
            stack.enter_context(ztok_fast.backend(backend, [op]))
        yield


def baselines_of(subject: Subject, case: Case, sets: Sequence, device, chosen: Sequence[str] | None = None):
    """One implementation per baseline and mark."""
    found = []
    for baseline in subject.baselines:
        if chosen is not None and baseline.name not in chosen:
            continue
        own = Implementation(baseline.name, baseline.kind, baseline=baseline)
        found.append(own)
        if device.type not in baseline.devices:
            own.drop("skipped", f"runs on {' or '.join(baseline.devices)}")
        elif reason := baseline.refuses(case):
            own.drop("skipped", reason)
        elif baseline.package and importlib.util.find_spec(baseline.package) is None:
            own.drop("missing", f"{baseline.distribution or baseline.package} is not installed")
        else:
            try:
                own.calls = [baseline.prepare(case, inputs) for inputs in sets[: baseline.max_sets]]
            except Exception as error:  # another project's code: whatever it raises is its result
                own.drop("failed", _said(error))
    return found


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def verify(own: Implementation, subject: Subject, case: Case, sets: Sequence) -> None:
    """Call once on every input set and check the first and the last answer; a wrong answer takes the calls away."""
    read = own.baseline.read if own.baseline else None
    if not own.calls or own.baseline and read is None:
        return
    try:
        with own.context():
            for index, call in enumerate(own.calls):
                found = call()
                if index in (0, len(own.calls) - 1):
                    if read is None:
                        subject.check(case, sets[index], found)
                    else:
                        subject.check_baseline(case, sets[index], read(found))
    except BackendUnavailable as error:
        own.drop("skipped", _said(error))
    except AssertionError as error:
        own.drop("wrong", _said(error))
    except Exception as error:  # an op or a baseline that raises has no speed either
        own.drop("failed", _said(error))
    else:
        own.checked = True


def input_sets(subject: Subject, case: Case, device: torch.device) -> list:
    """Random inputs of a fixed seed; several sets where the case must find the last cache cold."""
    sets: list = []
    moved, enough = 0, 4 * last_cache_bytes(device)
    while len(sets) < (MAX_INPUT_SETS if _is_cold(subject, case, device) else 1):
        sets.append(subject.make(case, torch.Generator(device).manual_seed(subject.seed(case) + len(sets))))
        moved += subject.work(case, sets[-1]).bytes
        if moved > enough or case.set == "tiny":
            break
    return sets


def _is_cold(subject: Subject, case: Case, device: torch.device) -> bool:
    return (case.cold or device.type == "cuda") and not subject.whole


def gradient_mode(case: Case):
    """Forward cases are timed without autograd, as inference runs them."""
    return contextlib.nullcontext() if case.direction == BACKWARD else torch.no_grad()


def measure(
    subject: Subject,
    case: Case,
    device: torch.device,
    seconds: float,
    marks: dict,
    backends: Sequence[str] | None = None,
    baselines: Sequence[str] | None = None,
) -> dict:
    """The results entry of one case, without the name of its run.

    Args:
        seconds: budget for timing all implementations together; verification comes on top.
        marks: of `machine.marks`, measured just before.
        backends, baselines: names to keep; None keeps all. An empty sequence keeps none.
    """
    cuda, sets = device.type == "cuda", input_sets(subject, case, device)
    with gradient_mode(case):
        everyone = backends_of(subject, case, sets, device, backends)
        everyone += baselines_of(subject, case, sets, device, baselines)
        for own in everyone:
            verify(own, subject, case, sets)
            if own.calls and subject.whole and not cuda and torch.get_num_threads() > 1:
                choose_threads(own)
        timed = [Timed(own.name, own.calls, own.context) for own in everyone if own.calls]
        least = MIN_ROUNDS_WHOLE if subject.whole else MIN_ROUNDS
        times = take_turns(timed, seconds, cuda, least) if timed else {}
        graphs, refused = _graph_times(timed, seconds) if cuda and timed and not subject.whole else ({}, {})
    work = subject.work(case, sets[0])
    floor = floor_seconds(work, case, device, marks)
    implementations = []
    for own in everyone:
        entry = own.as_dict()
        if own.name in times:
            entry["seconds"] = times[own.name]
            if cuda:
                entry |= {"graph_seconds": graphs.get(own.name), "no_graph": refused.get(own.name)}
            took = results.seconds(entry)
            moved = own.baseline.bytes(case, sets[0]) if own.baseline and own.baseline.bytes else work.bytes
            entry |= {"gflops": work.flops / took * 1e-9, "gbs": moved / took * 1e-9, "roofline": floor / took}
        implementations.append(entry)
    return {
        "key": subject.key(case),
        "op": subject.name,
        "shape": case.sizes,
        "dtype": short(case.dtype),
        "direction": case.direction,
        "device": device.type,
        "set": case.set,
        "cold": _is_cold(subject, case, device),
        "input_sets": len(sets),
        "marks": marks,
        "work": {"flops": work.flops, "bytes": work.bytes, "floor_seconds": floor},
        "implementations": implementations,
    }


@contextlib.contextmanager
def torch_threads(count: int):
    """So many threads for torch, and for the kernels that run in its pool, inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_threads(own: Implementation) -> None:
    """Give an implementation one thread or all, whichever its call is faster with.

    A step of decoding is many products of a few rows. A library that wakes a second thread for each of them loses more
    than it gains where threads do not spin, and must not be compared in that state.
    """
    took: dict[int, float] = {}
    for count in (1, torch.get_num_threads()) * 2:
        with torch_threads(count):
            start = time.perf_counter()
            own.calls[0]()
            took[count] = min(took.get(count, math.inf), time.perf_counter() - start)
    own.threads = min(took, key=took.get)
    own.context = functools.partial(torch_threads, own.threads)


def floor_seconds(work: Work, case: Case, device: torch.device, marks: dict) -> float:
    """The roofline: the longer of the operations at the rate of `torch.mm` and the bytes at that of a copy.

    CPU kernels multiply in fp32 whatever the input is; a GPU has its own rate for each dtype.
    """
    dtype = short(case.dtype) if device.type == "cuda" else "float32"
    rates = marks["mm_gflops"]
    return max(work.flops / (rates.get(dtype, rates["float32"]) * 1e9), work.bytes / (marks["copy_gbs"] * 1e9))


def _graph_times(timed: Sequence[Timed], seconds: float) -> tuple[dict[str, dict], dict[str, str]]:
    """Times per call of graph replays, and why there are none for some."""
    replays, refused = [], {}
    for own in timed:
        try:
            replays.append(graph_of(own))
        except Exception as error:  # a capture fails in as many ways as there are calls; the eager time stands
            refused[own.name] = _said(error)
            torch.cuda.synchronize()
    found = take_turns(replays, seconds / 2, cuda=True) if replays else {}
    for own in timed:
        for name in ("min", "median") if own.name in found else ():
            found[own.name][name] /= len(own.calls)
    return found, refused
