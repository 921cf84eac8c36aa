"""Streams whose symbols take turns: several rows of a stream are decoded from logits that were found side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.codec.layout import offsets, position_in_sequence
from ztok_fast.ops import decode_tokens


def decode_in_turns(logits: Tensor, stream: Tensor, state: Tensor, data: Tensor) -> Tensor:
    """A symbol of each row of ``logits`` ``[B, V]``, int64 ``[B]``.

    Args:
        stream: int64 ``[B]``, that of each row; rows of one stream come one after another in it.
        state: int64 ``[S, 4]`` of all streams, as of `range_decoder`; it is moved on. data: uint8, their bytes.
    """
    symbols = torch.empty(len(stream), dtype=torch.int64)
    order = stream.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = position_in_sequence(offsets(stream.bincount()), len(stream))
    for rows in place.argsort(stable=True).split(place.bincount().tolist()):
        symbols[rows], state[stream[rows]] = decode_tokens(logits[rows], state[stream[rows]], data)
    return symbols
