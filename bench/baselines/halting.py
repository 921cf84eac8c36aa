"""Baselines of `halting_units`."""

from __future__ import annotations

import torch

from bench.subject import Baseline, OpSubject, forward_float32, forward_only, same
from ztok_fast.ops.halting import reference
from ztok_fast.ops.spec import close, equal


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


def _check(inputs, answer):
    ends, weights = answer
    expected = reference.halting_units(inputs["mass"].detach().double(), inputs["cu_seqlens"], 1.0, "fire")
    equal(ends, expected[1], "ends")
    close(weights, expected[0], torch.float32, what="weights")


def _index_add(case, inputs):
    rows, weights, unit, total = (inputs[name] for name in ("rows", "weights", "unit", "total_units"))

    def call():
        sums = rows.new_zeros(total + 1, rows.shape[1]).index_add_(0, unit, rows * weights[:, :1])
        sums.index_add_(0, unit + 1, rows * weights[:, 1:])
        shares = weights.new_zeros(total + 1).index_add_(0, unit, weights[:, 0]).index_add_(0, unit + 1, weights[:, 1])
        return sums[:-1] / shares[:-1, None].clamp(min=1e-30), ()

    return call


NOTE = "torch.cumsum sequence by sequence; rows that end and weights only, offsets read beforehand"
LOOP = Baseline("loop of cumsum", _loop, same, refuses=forward_only, note=NOTE)
SUMS = Baseline("index_add", _index_add, same, refuses=forward_float32, note="torch.index_add of rows and of weights")
SUBJECTS = (
    OpSubject("halting_units", (LOOP,), loose_check=_check),
    OpSubject("integrate_units", (SUMS,)),
)
