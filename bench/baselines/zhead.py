"""Baselines of `z_select`."""

from __future__ import annotations

import torch

from bench.subject import Baseline, OpSubject, same
from ztok_fast.ops.spec import Mismatch

VOCABULARY = 49_152  # of SmolLM2


def _head(case, inputs, whole: bool):
    """The rows of a head: those of the Z-tokens, or with the rest of a vocabulary, made small so that the arg-max is
    still a Z row and can be checked."""
    rows = inputs["rows"]
    if not whole:
        return rows
    rest = (max(VOCABULARY, 2 * case["V"]) if case["V"] > 100 else 2 * case["V"]) - case["V"]
    return torch.cat([rows, torch.randn(rest, case["D"], device=rows.device, dtype=rows.dtype) * 1e-3])


def _select(whole: bool):
    def prepare(case, inputs):
        hidden, head = inputs["hidden"], _head(case, inputs, whole)
        if not case["temperature"]:
            return lambda: (hidden @ head.T).argmax(-1)
        return lambda: torch.multinomial(torch.softmax(hidden @ head.T / case["temperature"], -1), 1)[:, 0]

    return prepare


def _mm(case, inputs):
    hidden, rows = inputs["hidden"], inputs["rows"].T
    out = hidden.new_empty(case["B"], case["V"])
    return lambda: torch.mm(hidden, rows, out=out)


def _greedy(case):
    return None if not case["temperature"] else "samples: another draw"


def _sampling(case):
    return None if case["temperature"] else "arg-max: see the baseline of that name"


def _check(inputs, codes):
    logits = inputs["hidden"].double() @ inputs["rows"].double().T
    best = logits.max(-1).values
    short = best - logits.gather(-1, codes.long()[:, None])[:, 0]
    tolerance = 0.02 if inputs["hidden"].dtype != torch.float32 else 1e-4  # a half-precision product rounds its logits
    if bool((short > tolerance * best.abs().clamp(min=1)).any()):
        raise Mismatch("codes: not the arg-max")


BASELINES = (
    Baseline("full head + arg-max", _select(True), same, max_sets=2, refuses=_greedy,
             note=f"hidden @ head.T over {VOCABULARY:,} rows, then argmax"),
    Baseline("Z rows + arg-max", _select(False), same, refuses=_greedy,
             note="the same over the Z rows alone: codes only, no log-probabilities"),
    Baseline("full head + multinomial", _select(True), max_sets=2, refuses=_sampling,
             note=f"softmax and torch.multinomial over {VOCABULARY:,} rows; another draw, so unchecked"),
    Baseline("Z rows + multinomial", _select(False), refuses=_sampling,
             note="the same over the Z rows alone; another draw, so unchecked"),
    Baseline("mm", _mm, kind="mark", note="the bare product over the Z rows into memory that is there already"),
)  # fmt: skip

SUBJECTS = (OpSubject("z_select", BASELINES, loose_check=_check),)
