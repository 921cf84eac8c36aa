"""`decode_tokens`: the next token of each of many range-coded streams, from the logits of that token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import cpp
from ztok_fast.ops.entropy import reference
from ztok_fast.ops.entropy.range_encode import check_state_values, check_streams, range_decoder, range_encode
from ztok_fast.ops.entropy.token_intervals import check_logits, token_intervals
from ztok_fast.ops.entropy.token_intervals import make as make_logits
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import Case, Spec, Work, same_as

OP = "decode_tokens"


class DecodedTokens(NamedTuple):
    """Result of `decode_tokens` for B streams.

    Attributes:
        tokens: int64 [B], in [0, V).
        state: int64 [B, 4], for the next step.
    """

    tokens: Tensor
    state: Tensor


def decode_tokens(logits: Tensor, state: Tensor, data: Tensor) -> DecodedTokens:
    """Decode one token of each stream: the inverse of `token_intervals` and `range_encode`.

    A stream may also have symbols for `decode_symbols` between its tokens. A stream that is damaged or has ended gives
    arbitrary tokens of the vocabulary; no byte outside of `data` is read.

    O(B V) time, O(B) memory: counts are summed block by block, and only the block that has the token is summed again
    one by one. On a GPU the counts of all rows are in memory at once, and the host decodes.

    Args:
        logits: float32 [B, V], finite, V at most 500,000: the logits of the next token of each stream, bit for bit
            those that `token_intervals` was given.
        state: int64 [B, 4], from `range_decoder` or the last step; not changed.
        data: uint8 [N], the bytes of all streams.

    Returns:
        `DecodedTokens`. Not differentiable.

    Raises:
        ValueError: wrong rank, dtype, device or size; a logit that is NaN or infinite; a state that no decoder
            has.
    """
    given = checks.Arguments(OP)
    check_logits(given, logits, "[B, V]")
    check_streams(given, state, data)
    return DecodedTokens(*DECODE_TOKENS(logits, state, data))


def _check_values(logits: Tensor, state: Tensor, data: Tensor) -> None:
    checks.check_finite_values(OP, "logits", logits)
    check_state_values(OP, state)


def _fake(logits, state, data):
    return state.new_empty(state.shape[0]), state.new_empty(state.shape)


# --- specification


def make(sizes, dtype, generator):
    """`B` streams of one token each under `V` logits; of every fourth the bytes are `noise`, where that is wanted."""
    inputs = make_logits({**sizes, "T": sizes["B"]}, dtype, generator)
    streams = range_encode(
        *token_intervals(**inputs), torch.arange(sizes["B"] + 1, device=generator.device, dtype=torch.int32)
    )
    state = range_decoder(*streams)
    if sizes.get("noise"):
        state[::4, 1] = torch.randint(-(2**63), 2**63 - 1, state[::4, 1].shape, generator=generator).to(state)
        state[::4, 3] += 100
    return {"logits": inputs["logits"], "state": state, "data": streams.data}


DECODE_TOKENS = Op(
    "decode_tokens(Tensor logits, Tensor state, Tensor data) -> (Tensor, Tensor)",
    reference=reference.decode_tokens,
    fake=_fake,
    backends=(cpp((torch.float32,), checks_values=True),),
    check_values=_check_values,
    spec=Spec(
        decode_tokens,
        make,
        samples=(
            {"B": 1, "V": 1},
            {"B": 9, "V": 3, "noise": True},
            {"B": 0, "V": 5},
            {"B": 5, "V": 130, "scale": 100.0},
            {"B": 8, "V": 2047, "noise": True},
            {"B": 4, "V": 40000, "scale": 0.0},
        ),
        check=same_as(reference.decode_tokens),
        outputs=tuple,
        dtypes=(torch.float32,),
        cases=(
            Case({"B": 3, "V": 50}, set="tiny"),
            Case({"B": 128, "V": 2048}, set="quick"),  # ztok-mini
            Case({"B": 128, "V": 49152}),  # SmolLM2
        ),
        work=lambda case, inputs: Work(20.0 * case["B"] * case["V"], 4 * case["B"] * case["V"] + 72 * case["B"]),
        flops_of_reference=20.0,
    ),
)
