"""One case: build its inputs, verify every contender, time those that are right."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from bench.micro.case import BACKWARD, Case, Op, Peer, short
from bench.micro.machine import Disturbance, last_cache_bytes
from bench.micro.timing import Call, Contender, graph_of, take_turns
from ztok_fast.ops import dispatch, requirements

SLOW_CALL_SECONDS = 3.0
"""A backend whose guessed time for one call is longer is skipped, with that reason."""
FLOAT64_GFLOPS = {"cpu": 30.0, "cuda": 10_000.0}
"""Rough speed of the float64 reference, for that guess alone."""
MAX_INPUT_SETS = 64
OURS = "ours"
"""Name of a run of the whole codec among its contenders."""
MIN_ROUNDS, MIN_ROUNDS_WHOLE = 5, 3
"""Rounds that are timed whatever they take; a round of whole runs takes seconds."""


@dataclass
class Entrant:
    """A backend, peer or mark on its way from the registry to the results."""

    name: str
    kind: str  # "backend" or the kind of a peer
    status: str = "ok"
    reason: str | None = None
    checked: bool = False
    default: bool = False
    calls: list[Call] = field(default_factory=list)
    context: object = contextlib.nullcontext
    with_backends: dict[str, str] = field(default_factory=dict)
    threads: int | None = None  # of its own, where contenders choose

    def drop(self, status: str, reason: str) -> None:
        self.status, self.reason, self.calls = status, reason, []

    def as_dict(self) -> dict:
        entry = {
            "name": self.name,
            "kind": self.kind,
            "status": self.status,
            "reason": self.reason,
            "checked": self.checked,
        }
        if self.kind == "backend":
            entry |= {"default": self.default, "with": self.with_backends}
        return entry | ({} if self.threads is None else {"threads": self.threads})


def wanted_backends(op: str) -> list[str]:
    """Backends of an op in order of preference, straight from the requirements table."""
    return list(dict.fromkeys(row.backend for row in requirements.rows_of(op)))


def _reasons(op: str, backend: str, main: torch.Tensor) -> list[str]:
    """Why a backend cannot run an op on this input; empty when one of its rows can."""
    width = main.shape[-1] if main.ndim > 1 else None
    reasons: list[str] = []
    for row in requirements.rows_of(op):
        if row.backend != backend:
            continue
        own = requirements.unmet(row, main.device, main.dtype, width)
        if row.library == "triton" and (main.device.type != "cuda" or os.environ.get("TRITON_INTERPRET", "0") != "0"):
            own.append("interpreted Triton is for tests and is not timed")
        if not own:
            return []
        reasons += own
    return reasons or [f"{op} has no backend {backend}"]


def _family(op: Op, backend: str, device: torch.device) -> dict[str, str]:
    """Backends to force together: the op's own for the op, its backward and its companions as far as they have it
    here, and for the others the one that would be chosen freely."""
    forced = {}
    for name in (op.name, f"{op.name}_backward", *op.companions):
        if name in requirements.ops():
            have = [row.backend for row in requirements.rows_of(name) if not requirements.unmet(row, device)]
            if have:
                forced[name] = backend if backend in have else have[0]
    return forced


def backend_entrants(op: Op, case: Case, sets: Sequence[dict], device, chosen: Sequence[str] | None) -> list[Entrant]:
    """One entrant per backend in the requirements table; of a run of the whole codec the run alone."""
    if op.whole:
        entrant = Entrant(OURS, "backend", default=True, calls=[_op_call(op, case, inputs) for inputs in sets])
        # a library that is missing or stale leaves the reference: it is to be seen in the results
        entrant.with_backends = {name: dispatch.choose(name, device, case.dtype).backend for name in op.companions}
        return [entrant] if chosen is None or OURS in chosen else []
    main = op.main(sets[0])
    try:
        default = dispatch.choose(op.name, device, main.dtype, main.shape[-1] if main.ndim > 1 else None).backend
    except dispatch.BackendUnavailable:
        default = None
    entrants = []
    for name in wanted_backends(op.name):
        if chosen is not None and name not in chosen:
            continue
        entrant = Entrant(name, "backend", default=name == default)
        entrants.append(entrant)
        if reasons := _reasons(op.name, name, main):
            entrant.drop("skipped", "; ".join(reasons))
            continue
        guess = op.work(case, sets[0]).flops * op.flops_of_reference / (FLOAT64_GFLOPS[device.type] * 1e9)
        if name == "reference" and guess > SLOW_CALL_SECONDS:
            entrant.drop("skipped", f"in float64 a call would take about {guess:.0f} s")
            continue
        forced = _family(op, name, device)
        if case.direction == BACKWARD:
            # what runs there instead, so that a reader knows what was timed
            entrant.with_backends = {other: own for other, own in forced.items() if own != name}
        entrant.context = _forcing(forced)
        entrant.calls = [_op_call(op, case, inputs) for inputs in sets]
    return entrants


def _forcing(forced: dict[str, str]):
    @contextlib.contextmanager
    def context():
        with contextlib.ExitStack() as stack:
            for op, backend in forced.items():  # the op before its backward, which it would force as well
                stack.enter_context(dispatch.backend(backend, [op]))
            yield

    return context


def _op_call(op: Op, case: Case, inputs: dict) -> Call:
    return lambda: op.run(case, inputs)


def peer_entrants(
    op: Op, case: Case, sets: Sequence[dict], device, chosen: Sequence[str] | None
) -> list[tuple[Entrant, Peer]]:
    """One entrant per peer and mark of the op."""
    entrants = []
    for peer in op.peers:
        if chosen is not None and peer.name not in chosen:
            continue
        entrant = Entrant(peer.name, peer.kind)
        entrants.append((entrant, peer))
        if device.type not in peer.devices:
            entrant.drop("skipped", f"runs on {' or '.join(peer.devices)}")
        elif reason := peer.refuses(case):
            entrant.drop("skipped", reason)
        elif peer.package and importlib.util.find_spec(peer.package) is None:
            entrant.drop("missing", f"{peer.distribution} is not installed")
        else:
            try:
                entrant.calls = [peer.prepare(case, inputs) for inputs in sets[: peer.max_sets]]
            except Exception as error:  # another project's code: whatever it raises is its result
                entrant.drop("failed", _said(error))
    return entrants


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def verify(entrant: Entrant, check, read=lambda found: found) -> None:
    """Call once on every input set and hold the answers against the oracle; a red check takes the calls away."""
    try:
        with entrant.context():
            for index, call in enumerate(entrant.calls):
                found = call()
                if index == 0 or index == len(entrant.calls) - 1:
                    check(index, read(found))
    except AssertionError as error:
        entrant.drop("wrong", _said(error))
    except Exception as error:  # an op or a peer that raises has no speed either
        entrant.drop("failed", _said(error))
    else:
        entrant.checked = True


def input_sets(op: Op, case: Case, device: torch.device) -> list[dict]:
    """Random inputs of a fixed seed; several sets where the case is to find the last cache cold."""
    sets: list[dict] = []
    moved, enough = 0, 4 * last_cache_bytes(device)
    cold = (case.cold or device.type == "cuda") and not op.whole
    while len(sets) < (MAX_INPUT_SETS if cold else 1):
        # crc32 and not hash(): the same inputs in every process
        generator = torch.Generator(device).manual_seed(zlib.crc32(case.key.encode()) + len(sets))
        sets.append(op.make(case, device, generator))
        moved += op.work(case, sets[-1]).bytes
        if moved > enough or case.set == "tiny":
            break
    return sets


def gradient_mode(case: Case):
    """Forward cases are timed without autograd, as inference runs them."""
    return contextlib.nullcontext() if case.direction == BACKWARD else torch.no_grad()


def verified_entrants(op: Op, case: Case, sets: Sequence[dict], device, backends=None, peers=None) -> list[Entrant]:
    """All backends, peers and marks of a case; only those that are right still have calls. In `gradient_mode`."""
    entrants = backend_entrants(op, case, sets, device, backends)
    pairs = peer_entrants(op, case, sets, device, peers)
    for entrant in entrants:
        if entrant.calls:
            verify(entrant, lambda i, found: op.check(case, sets[i], found))
    for entrant, peer in pairs:
        if entrant.calls and peer.read is not None:
            verify(entrant, lambda i, found: op.check_peer(case, sets[i], found), peer.read)
    return [*entrants, *(entrant for entrant, _ in pairs)]


def measure(
    op: Op,
    case: Case,
    device: torch.device,
    seconds: float,
    marks: dict,
    backends: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    say=lambda text: None,
) -> dict:
    """The results entry of one case, without the name of its run.

    Args:
        seconds: budget for timing all contenders together; verification comes on top.
        marks: of `machine.marks`, measured just before.
        backends, peers: names to keep; None keeps all. An empty sequence keeps none.
        say: called with progress in words.
    """
    cuda = device.type == "cuda"
    sets = input_sets(op, case, device)
    with gradient_mode(case):
        everyone = verified_entrants(op, case, sets, device, backends, peers)
        if op.whole and not cuda:
            for entrant in everyone:
                if entrant.calls:
                    choose_threads(entrant)
        racing = [Contender(e.name, e.calls, e.context) for e in everyone if e.calls]
        say(
            f"{case.key}: {len(racing)} contenders, {len(sets)} input set{'s' if len(sets) > 1 else ''}{_used(everyone)}"
        )
        with Disturbance() as disturbance:
            least = MIN_ROUNDS_WHOLE if op.whole else MIN_ROUNDS
            times = take_turns(racing, seconds, cuda, least) if racing else {}
        graphs, refused = _graph_times(racing, seconds) if cuda and racing and not op.whole else ({}, {})
    work = op.work(case, sets[0])
    floor = floor_seconds(work, case, device, marks)
    contenders = []
    for entrant in everyone:
        entry = entrant.as_dict()
        if entrant.name in times:
            entry["seconds"] = times[entrant.name].as_dict()
            if cuda:
                graph = graphs.get(entrant.name)
                entry["graph_seconds"] = graph.as_dict() if graph else None
                entry["no_graph"] = refused.get(entrant.name)
            compared = (entry.get("graph_seconds") or entry["seconds"])["median"]
            entry["gflops"] = work.flops / compared * 1e-9
            own_bytes = next((p.bytes for p in op.peers if p.name == entrant.name and p.bytes), None)
            entry["gbs"] = (own_bytes(case, sets[0]) if own_bytes else work.bytes) / compared * 1e-9
            entry["roofline"] = floor / compared
        contenders.append(entry)
    return {
        "key": case.key,
        "op": case.op,
        "shape": case.shape,
        "dtype": short(case.dtype),
        "direction": case.direction,
        "device": device.type,
        "set": case.set,
        "cold": (case.cold or cuda) and not op.whole,
        "input_sets": len(sets),
        "marks": marks,
        "disturbance": disturbance.shares,
        "work": {"flops": work.flops, "bytes": work.bytes, "floor_seconds": floor},
        "contenders": contenders,
    }


@contextlib.contextmanager
def torch_threads(count: int):
    """So many threads for torch and for the kernels that run in its pool, inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_threads(entrant: Entrant) -> None:
    """Give a contender one thread or all, whichever its call is faster with.

    A step of decoding is many products of a few rows; libraries that wake a second thread for each lose more than they
    gain where threads do not spin, and are not to be compared in that state.
    """
    everything, took = torch.get_num_threads(), {}
    for count in {1, everything}:
        with torch_threads(count):
            samples = []
            for _ in range(2):
                start = time.perf_counter()
                entrant.calls[0]()
                samples.append(time.perf_counter() - start)
            took[count] = min(samples)
    entrant.threads = min(took, key=took.get)
    entrant.context = functools.partial(torch_threads, entrant.threads)


def _used(everyone: Sequence[Entrant]) -> str:
    """The backends inside a run of the whole codec, for the terminal."""
    used = {name: own for entrant in everyone if entrant.name == OURS for name, own in entrant.with_backends.items()}
    return "".join(f"; {name}: {own}" for name, own in used.items())


def floor_seconds(work, case: Case, device: torch.device, marks: dict) -> float:
    """The roofline: the longer of the operations at the rate of `torch.mm` and the bytes at that of a copy.

    CPU kernels multiply in fp32 whatever the input is; a GPU has its own rate for each dtype.
    """
    dtype = short(case.dtype) if device.type == "cuda" else "float32"
    rates = marks["mm_gflops"]
    return max(work.flops / (rates.get(dtype, rates["float32"]) * 1e9), work.bytes / (marks["copy_gbs"] * 1e9))


def _graph_times(racing: Sequence[Contender], seconds: float):
    """Times per call of graph replays, and why there are none for some."""
    replays, refused = [], {}
    for contender in racing:
        try:
            replays.append(graph_of(contender))
        except Exception as error:  # a capture fails in as many ways as there are calls; the eager time stands
            refused[contender.name] = _said(error)
            torch.cuda.synchronize()
    counts = {contender.name: len(contender.calls) for contender in racing}
    found = take_turns(replays, seconds / 2, cuda=True) if replays else {}
    return {name: _per_call(times, counts[name]) for name, times in found.items()}, refused


def _per_call(times, count):
    return replace(
        times, min=times.min / count, p25=times.p25 / count, median=times.median / count, p75=times.p75 / count
    )


def wrong_backends(entry: dict) -> list[str]:
    """Backends of a results entry whose answer was wrong or that raised: what makes the command fail."""
    return [
        f"{entry['key']}: {contender['name']}: {contender['status']}: {contender['reason']}"
        for contender in entry["contenders"]
        if contender["kind"] == "backend" and contender["status"] in ("wrong", "failed")
    ]
