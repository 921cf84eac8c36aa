"""`z_select`: the next Z-token from the Z rows alone."""

from __future__ import annotations

from dataclasses import fields

import torch

from bench.micro.case import Case, Mismatch, Op, Peer
from bench.micro.shapes import VOCABULARY
from ztok_fast import ops
from ztok_fast.ops.zhead.z_select import SPEC


def make(case, device, generator):
    inputs = SPEC.make(case.shape, case.dtype, generator)
    # The rest of a vocabulary, made small so that its arg-max is that of the Z rows and can be checked.
    inputs["rest"] = (max(VOCABULARY, 2 * case["V"]) if case["V"] > 100 else 2 * case["V"]) - case["V"]
    return inputs


def run(case, inputs):
    return ops.z_select(inputs["hidden"], inputs["rows"], temperature=case["temperature"], seed=7)


def check(case, inputs, result):
    SPEC.check(inputs, result)


def check_peer(case, inputs, codes):
    logits = inputs["hidden"].double() @ inputs["rows"].double().T
    best = logits.max(-1).values
    short = best - logits.gather(-1, codes.long()[:, None])[:, 0]
    tolerance = 0.02 if case.dtype != torch.float32 else 1e-4  # a half-precision product rounds its logits
    if bool((short > tolerance * best.abs().clamp(min=1)).any()):
        raise Mismatch("codes: not the arg-max")


def _full_head(case, inputs):
    hidden = inputs["hidden"]
    rest = torch.randn(inputs["rest"], case["D"], device=hidden.device, dtype=hidden.dtype) * 1e-3
    head = torch.cat([inputs["rows"], rest])
    if not case["temperature"]:
        return lambda: (hidden @ head.T).argmax(-1)
    return lambda: torch.multinomial(torch.softmax(hidden @ head.T / case["temperature"], -1), 1)[:, 0]


def _z_rows(case, inputs):
    hidden, rows = inputs["hidden"], inputs["rows"]
    if not case["temperature"]:
        return lambda: (hidden @ rows.T).argmax(-1)
    return lambda: torch.multinomial(torch.softmax(hidden @ rows.T / case["temperature"], -1), 1)[:, 0]


def _mm(case, inputs):
    hidden, rows = inputs["hidden"], inputs["rows"].T
    out = hidden.new_empty(case["B"], case["V"])
    return lambda: torch.mm(hidden, rows, out=out)


def _greedy_answer(case):
    return None if not case["temperature"] else "samples: another draw"


def _sampling(case):
    return None if case["temperature"] else "arg-max: see the peer of that name"


PEERS = (
    Peer(
        "full head + arg-max",
        _full_head,
        lambda codes: codes,
        max_sets=2,
        refuses=_greedy_answer,
        note=f"hidden @ head.T over {VOCABULARY:,} rows, then argmax",
    ),
    Peer(
        "Z rows + arg-max",
        _z_rows,
        lambda codes: codes,
        refuses=_greedy_answer,
        note="the same over the Z rows alone: codes only, no log-probabilities",
    ),
    Peer(
        "full head + multinomial",
        _full_head,
        max_sets=2,
        refuses=_sampling,
        note=f"softmax and torch.multinomial over {VOCABULARY:,} rows; another draw, so unchecked",
    ),
    Peer(
        "Z rows + multinomial",
        _z_rows,
        refuses=_sampling,
        note="the same over the Z rows alone; another draw, so unchecked",
    ),
    Peer("mm", _mm, kind="mark", note="the bare product over the Z rows into memory that is there already"),
)

OP = Op(
    "z_select",
    tuple(Case("z_select", *(getattr(case, f.name) for f in fields(case))) for case in SPEC.cases),
    make,
    lambda inputs: inputs["hidden"],
    run,
    check,
    SPEC.work,
    check_peer,
    PEERS,
    flops_of_reference=3.0,
)
