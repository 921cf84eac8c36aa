"""Philox4x32-10, the counter-based random generator that the Z head samples with.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A counter-based generator is a
keyed function of its counter: the numbers of one row at one step do not depend on what else is in the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Multipliers of the two halves of the state, and the Weyl constants added to the key after each round: the golden
# ratio and sqrt(3) - 1 as 32-bit fractions (section 4.3 of the paper).
MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85
ROUNDS = 10
MASK_32 = 0xFFFFFFFF


def split_64(value: Any) -> tuple[Any, Any]:
    """The low and the high 32 bits of a 64-bit integer or int64 tensor; a negative one is taken in two's complement."""
    return value & MASK_32, (value >> 32) & MASK_32


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four 32-bit random words for every counter of four words, by a key of two.

    Words of tensors, of broadcastable shapes, are int64 with values in [0, 2³²).
    """
    words = torch.broadcast_tensors(*counter)
    for i in range(ROUNDS):
        # a product may set the sign bit: its bits are right all the same, and `split_64` undoes the sign extension
        low_0, high_0 = split_64(MULTIPLIER_0 * words[0])
        low_1, high_1 = split_64(MULTIPLIER_1 * words[2])
        key_0, key_1 = (key[0] + i * WEYL_0) & MASK_32, (key[1] + i * WEYL_1) & MASK_32
        words = high_1 ^ words[1] ^ key_0, low_1, high_0 ^ words[3] ^ key_1, low_0
    return words
