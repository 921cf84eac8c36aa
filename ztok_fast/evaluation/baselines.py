"""Baselines that a codec has to beat at its rate: token ids written down until the bits run out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ztok_fast.codec.layout import expand_ranges, offsets
from ztok_fast.codec.passes import BATCH_SEGMENTS
from ztok_fast.codec.slot_coding import encode_tokens
from ztok_fast.evaluation.sample import Sample
from ztok_fast.evaluation.scores import Outcome

HALVINGS = 20
"""Of the share of the tokens that is written, to find the one that the bits pay for."""


def token_ids(sample: Sample, bits: float) -> Outcome:
    """Ids of the first tokens of every segment, an equal share of each; the bare base model guesses the rest."""
    lengths = sample.cu_segments.diff()[sample.segment]
    told, spent, plain = _paid_for(sample, sample.position, lengths, bits, _cost_of_ids(sample))
    return _guessed_on(sample, told, spent, plain)


def coded_text(sample: Sample, bits: float) -> Outcome:
    """The same, with the tokens coded under the bare base model as coded units are; ends of streams do not count."""
    lengths = sample.cu_segments.diff()[sample.segment]

    def cost(told: torch.Tensor) -> tuple[float, float]:
        return (float(sample.own_bits[told].double().sum()),) * 2

    return _guessed_on(sample, *_paid_for(sample, sample.position, lengths, bits, cost))


def _guessed_on(sample: Sample, told: torch.Tensor, spent: float, plain: float) -> Outcome:
    predicted = torch.where(told, sample.tokens, sample.base_guesses)
    loss = torch.where(told, 0.0, sample.own_bits)
    return Outcome(spent, plain, loss, predicted, _go_on(sample, told), told)


def truncation(sample: Sample, bits: float) -> Outcome:
    """Ids of the first tokens of every document, an equal share of each; the rest is lost."""
    sizes = torch.tensor([len(d) for d in sample.documents])
    starts = offsets(sizes)[:-1].long()[sample.document]
    position = torch.arange(len(sample)) - starts
    told, spent, plain = _paid_for(sample, position, sizes[sample.document], bits, _cost_of_ids(sample))
    written = torch.where(told, sample.tokens, -1)
    return Outcome(spent, plain, torch.where(told, 0.0, sample.own_bits), written, written, told)


Cost = Callable[[torch.Tensor], tuple[float, float]]
"""Of told tokens, bool ``[T]``: bits as they are stored, and with every code at its full width."""


def _cost_of_ids(sample: Sample) -> Cost:
    def cost(told: torch.Tensor) -> tuple[float, float]:
        plain = int(told.sum()) * sample.vocabulary_bits
        # In the same way as the codes of slots; few ids take less room as they are.
        return min(plain, 8.0 * len(encode_tokens(sample.tokens[told], sample.vocabulary))), plain

    return cost


def _paid_for(sample: Sample, position, lengths, bits: float, cost: Cost) -> tuple[torch.Tensor, float, float]:
    """The largest share of every stretch that costs at most ``bits``: which tokens those are, and their bits.

    Args:
        position, lengths: int64 ``[T]``, where a token is in its stretch and how long that is.
    """

    def told(share: float) -> torch.Tensor:
        return position < (share * lengths.double() + 1e-9).floor()

    low, high = 0.0, 1.0
    if cost(told(1.0))[0] <= bits:
        low = 1.0
    while low < high and high - low > 2.0**-HALVINGS:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(told(middle))[0] <= bits else (low, middle)
    found = told(low)
    return found, *cost(found)


@torch.inference_mode()
def _go_on(sample: Sample, told: torch.Tensor) -> torch.Tensor:
    """Greedy continuations of what is told of every segment, by the bare base model; -1 where nothing is told."""
    model = sample.codec.model
    counts = torch.zeros(len(sample.cu_segments) - 1, dtype=torch.int64).index_add_(0, sample.segment, told.long())
    missing = sample.cu_segments.diff().long() - counts
    written = torch.where(told, sample.tokens, -1)
    begun = ((counts > 0) & (missing > 0)).nonzero()[:, 0]
    # The batch loses its last sequences first.
    begun = begun[missing[begun].argsort(descending=True, stable=True)]
    for members in begun.split(BATCH_SEGMENTS) if len(begun) else ():
        starts = sample.cu_segments[:-1].long()[members]
        rows, cu = expand_ranges(starts, starts + counts[members])
        embeds = model.adapted.embedding(sample.tokens[rows].to(model.device))
        left, position = missing[members].tolist(), counts[members].to(model.device)
        with model.runtime.session(
            None, embeds, sample.position[rows].to(model.device), cu.to(model.device), left[0] - 1
        ) as session:
            for step in range(left[0]):
                going = sum(count > step for count in left)
                token = model.runtime.argmax(session.last)[:going]
                written[starts[:going] + counts[members[:going]] + step] = token.cpu()
                going = sum(count > step + 1 for count in left)
                if going:
                    session.step(model.adapted.embedding(token[:going]), position[:going] + step)
    return written
