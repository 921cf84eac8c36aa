"""`z_select`: the next Z-token from the Z rows alone."""

from __future__ import annotations

import torch

from bench.micro.case import Case, Mismatch, Op, Peer, Work, close, randn
from bench.micro.shapes import QWEN3, SMOLLM2, VOCABULARY
from ztok_fast import ops
from ztok_fast.ops.zhead import reference


def _cases():
    found: dict[str, Case] = {}

    def add(B, V, D, smallest, temperature=0.0, dtype=torch.float32, devices=("cpu", "cuda")):
        shape = {"B": B, "V": V, "D": D, "temperature": temperature}
        case = Case("z_select", shape, dtype, set=smallest, devices=devices, cold=True)
        found.setdefault(case.key, case)

    add(5, 41, 12, "tiny")
    add(5, 41, 12, "tiny", 1.0)
    add(1, 1025, SMOLLM2[0], "quick")
    for B in (1, 16, 256):
        add(B, 4097, SMOLLM2[0], "default")
    add(16, 1025, SMOLLM2[0], "default")
    add(16, 4097, QWEN3[0], "default")
    add(1, 4097, SMOLLM2[0], "default", 1.0)
    add(16, 4097, SMOLLM2[0], "default", 1.0)
    add(16, 4097, SMOLLM2[0], "default", dtype=torch.bfloat16)
    for B in (1, 16, 256):
        for temperature in (0.0, 1.0):
            add(B, 4097, QWEN3[0], "full" if temperature else "default", temperature, torch.bfloat16, ("cuda",))
            add(B, 4097, QWEN3[0], "full", temperature)
    return tuple(found.values())


def make(case, device, generator):
    return {
        "hidden": randn(generator, case["B"], case["D"], dtype=case.dtype),
        "rows": randn(generator, case["V"], case["D"], scale=case["D"] ** -0.5, dtype=case.dtype),
        # The rest of a vocabulary, made small so that its arg-max is that of the Z rows and can be checked.
        "rest": (max(VOCABULARY, 2 * case["V"]) if case["V"] > 100 else 2 * case["V"]) - case["V"],
    }


def run(case, inputs):
    return ops.z_select(inputs["hidden"], inputs["rows"], temperature=case["temperature"], seed=7)


def check(case, inputs, result):
    logits = inputs["hidden"].double() @ inputs["rows"].double().T
    scores = logits
    if case["temperature"]:
        row_ids = torch.arange(case["B"], device=logits.device)
        scores = logits / case["temperature"] + reference.gumbel_noise(case["V"], row_ids, 7, 0)
    _check_arg_max(scores, result.codes)
    chosen = logits.log_softmax(-1).gather(-1, result.codes.long()[:, None])[:, 0]
    close(result.log_probs, chosen, torch.float32, 5, "log_probs")


def _check_arg_max(scores, codes):
    """The code of the largest score, or of one that float32 rounding of the logits cannot tell from it."""
    if codes.shape != scores.shape[:1] or int(codes.min()) < 0 or int(codes.max()) >= scores.shape[1]:
        raise Mismatch(f"codes: expected {list(scores.shape[:1])} in [0, {scores.shape[1]}), got {list(codes.shape)}")
    best = scores.max(-1).values
    short = best - scores.gather(-1, codes.long()[:, None])[:, 0]
    allowed = 2 * torch.finfo(torch.float32).eps * scores.abs().max(-1).values
    if bool((short > allowed).any()):
        raise Mismatch(f"codes: {int((short > allowed).sum())} of {len(codes)} are not the arg-max")


def check_peer(case, inputs, codes):
    logits = inputs["hidden"].double() @ inputs["rows"].double().T
    best = logits.max(-1).values
    short = best - logits.gather(-1, codes.long()[:, None])[:, 0]
    tolerance = 0.02 if case.dtype != torch.float32 else 1e-4  # a half-precision product rounds its logits
    if bool((short > tolerance * best.abs().clamp(min=1)).any()):
        raise Mismatch("codes: not the arg-max")


def work(case, inputs):
    B, V, D, size = case["B"], case["V"], case["D"], case.dtype.itemsize
    return Work(2.0 * B * V * D, (B + V) * D * size + 8 * B)


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
    _cases(),
    make,
    lambda inputs: inputs["hidden"],
    run,
    check,
    work,
    check_peer,
    PEERS,
    flops_of_reference=3.0,
)
