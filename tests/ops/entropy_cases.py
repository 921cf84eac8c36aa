"""Distributions and streams for the tests of entropy coding."""

import math
from contextlib import contextmanager

import torch

from ztok_fast import ops


def realistic(rows, size, generator, shift=2.7, exponent=1.1, noise=2.0):
    """Logits [rows, size] of Zipf's law in a random order, with noise of each row: what a language model gives."""
    ranks = torch.arange(1, size + 1, dtype=torch.float64)
    zipf = -exponent * torch.log(ranks + shift)
    zipf = zipf[torch.randperm(size, generator=generator)]
    return (zipf + noise * torch.randn(rows, size, generator=generator, dtype=torch.float64)).float()


def adversarial(size, generator):
    """Name -> one row of logits [size]."""
    one_hot = torch.full((size,), -40.0)
    one_hot[size // 2] = 60.0
    alternating = torch.zeros(size)
    alternating[::2] = 3e38
    alternating[1::2] = -3e38
    return {
        "uniform": torch.full((size,), -7.25),
        "one hot": one_hot,
        "far below": torch.arange(size, dtype=torch.float32) * -50,
        "huge": alternating,
        "ties": torch.randint(-2, 3, (size,), generator=generator).float(),
        "tiny": torch.randn(size, generator=generator) * 1e-38,
        "wide": torch.randn(size, generator=generator) * 30,
        "realistic": realistic(1, size, generator)[0],
    }


def bits_of(logits, targets):
    """Exact -log2 of the probabilities of targets, in float64."""
    nats = logits.double().logsumexp(1) - logits.double().gather(1, targets[:, None].long())[:, 0]
    return nats / math.log(2)


def draws(logits, generator):
    """Targets [T], each from its row's own distribution."""
    return torch.multinomial(logits.double().softmax(1), 1, generator=generator)[:, 0]


def decode(logits, cu_symbols, streams):
    """The tokens of packed streams, decoded side by side: all streams that have a next token in one step."""
    state, lengths = ops.range_decoder(*streams), cu_symbols.diff()
    tokens = torch.full((int(cu_symbols[-1]),), -1)
    for step in range(int(lengths.max()) if len(lengths) else 0):
        rows = (lengths > step).nonzero()[:, 0]
        at = cu_symbols[rows] + step
        tokens[at], state[rows] = ops.decode_tokens(logits[at], state[rows], streams.data)
    return tokens


@contextmanager
def instruction_set(number):
    """Kernels of one instruction set in the block; gives whether this processor has it."""
    before = torch.ops.ztok.isa_native(-1)
    try:
        yield torch.ops.ztok.isa_native(number) == number
    finally:
        torch.ops.ztok.isa_native(before)
