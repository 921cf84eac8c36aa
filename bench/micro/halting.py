"""`halting_units`: which rows of packed sequences end a unit."""

from __future__ import annotations

import torch

from bench.micro.case import BACKWARD, FORWARD, Case, Op, Peer, Work, close, equal, randn, with_gradients
from bench.micro.shapes import mixed_lengths, offsets
from ztok_fast import ops
from ztok_fast.ops.halting import reference


def _cases():
    found: dict[str, Case] = {}

    def add(B, S, smallest, direction=FORWARD, devices=("cpu", "cuda")):
        case = Case("halting_units", {"B": B, "S": S}, torch.float32, direction, smallest, devices)
        found.setdefault(case.key, case)

    add(3, 20, "tiny")
    add(3, 20, "tiny", BACKWARD)
    add(16, 512, "quick")
    for B, S in ((1, 64), (1, 65536), (16, 512), (256, 512)):
        add(B, S, "default")
    add(16, 512, "default", BACKWARD)
    add(256, 512, "default", BACKWARD)
    add(1024, 4096, "full")
    for direction in (FORWARD, BACKWARD):
        add(1024, 4096, "default", direction, ("cuda",))
    return tuple(found.values())


def some_mass(rows, generator):
    """Mass of about a quarter per row, so that a unit has four rows; multiples of 2⁻¹⁴, exact in every backend."""
    draws = torch.rand(rows, generator=generator, device=generator.device)
    return (draws * 0.5 * 2**14).round() / 2**14


def make(case, device, generator):
    lengths = mixed_lengths(case["B"], case["S"], generator)
    inputs = {"mass": some_mass(sum(lengths), generator), "cu_seqlens": offsets(lengths, device), "lengths": lengths}
    if case.direction == BACKWARD:
        inputs["grad"] = randn(generator, sum(lengths), 2)
        inputs["mass"].requires_grad_()
    return inputs


def run(case, inputs):
    units = ops.halting_units(inputs["mass"], inputs["cu_seqlens"])
    if case.direction == FORWARD:
        return units, ()
    return units, with_gradients([units.weights], [inputs["mass"]], [inputs["grad"]])


def check(case, inputs, found):
    units, grads = found
    mass = inputs["mass"].detach()
    weights, ends, unit, counts, cu_units = reference.halting_units(mass.double(), inputs["cu_seqlens"], 1.0, "fire")
    for name, wanted in (("ends", ends), ("unit", unit), ("counts", counts), ("cu_units", cu_units)):
        equal(getattr(units, name), wanted, name)
    close(units.weights, weights, torch.float32, what="weights")
    if grads:
        exact = mass.double().requires_grad_()
        with torch.enable_grad(), ops.backend("reference"):
            outputs = [ops.halting_units(exact, inputs["cu_seqlens"]).weights]
        wanted = with_gradients(outputs, [exact], [inputs["grad"].double()])[0]
        # A row's gradient sums those of all later rows of its sequence, of either sign.
        size = float(wanted.square().mean().sqrt())
        close(grads[0] / size, wanted / size, torch.float32, 5, "gradient of the mass, divided by its root mean square")


def check_peer(case, inputs, found):
    ends, weights = found
    expected = reference.halting_units(inputs["mass"].detach().double(), inputs["cu_seqlens"], 1.0, "fire")
    equal(ends, expected[1], "ends")
    close(weights, expected[0], torch.float32, what="weights")


def work(case, inputs):
    rows = inputs["mass"].shape[0]
    moved = rows * (4 + 8 + 1 + 4) + 4 * case["B"] * 3
    return Work(0.0, moved + (rows * 16 if case.direction == BACKWARD else 0))


def _loop(case, inputs):
    """Cumulative sums sequence by sequence: exact in float64, because the mass is a multiple of 2⁻¹⁴."""
    mass, starts = inputs["mass"], inputs["cu_seqlens"].tolist()

    def call():
        all_ends, all_weights = [], []
        for start, stop in zip(starts, starts[1:]):
            own = mass[start:stop].double()
            total = own.cumsum(0)
            before = total - own
            fired = total.floor() > before.floor()
            carried = torch.where(fired, total - total.floor(), 0)
            carried[-1] = 0
            share = torch.where(fired, 1 - (before - before.floor()), own)
            fired[-1] = True
            all_ends.append(fired)
            all_weights.append(torch.stack([share, carried], 1).float())
        return torch.cat(all_ends), torch.cat(all_weights)

    return call


PEERS = (
    Peer(
        "loop of cumsum",
        _loop,
        lambda found: found,
        refuses=lambda case: "forward only" if case.direction == BACKWARD else None,
        note="torch.cumsum sequence by sequence; rows that end and weights only, offsets read beforehand",
    ),
)

OP = Op("halting_units", _cases(), make, lambda inputs: inputs["mass"], run, check, work, check_peer, PEERS)
