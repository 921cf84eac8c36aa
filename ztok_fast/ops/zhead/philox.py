"""Philox4x32-10, the counter-based random generator that the Z head samples with.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A counter-based generator is a
keyed function of its counter: the numbers of one row at one step do not depend on what else is in the batch.
"""

from __future__ import annotations

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


def split_64(value: int) -> tuple[int, int]:
    """Return the low and the high 32 bits of a 64-bit integer; a negative one is taken in two's complement."""
    return value & MASK_32, (value >> 32) & MASK_32


def multiply_high_low(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of `multiplier * word`, both factors below 2³²."""
    # The 64-bit product may set the sign bit; its bits are right all the same, and the mask undoes the sign extension.
    product = word * multiplier
    return (product >> 32) & MASK_32, product & MASK_32


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four 32-bit random words for every counter.

    Args:
        counter: the four counter words, int64 tensors of broadcastable shapes with values in [0, 2³²).
        key: the two key words, in [0, 2³²).

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2³²).
    """
    word_0, word_1, word_2, word_3 = torch.broadcast_tensors(*counter)
    key_0, key_1 = key
    for _ in range(ROUNDS):
        high_0, low_0 = multiply_high_low(MULTIPLIER_0, word_0)
        high_1, low_1 = multiply_high_low(MULTIPLIER_1, word_2)
        word_0, word_1, word_2, word_3 = (
            high_1 ^ word_1 ^ key_0,
            low_1,
            high_0 ^ word_3 ^ key_1,
            low_0,
        )
        key_0, key_1 = (key_0 + WEYL_0) & MASK_32, (key_1 + WEYL_1) & MASK_32
    return word_0, word_1, word_2, word_3
