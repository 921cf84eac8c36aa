"""Z-space language modelling over slots: one row of the inferencer for every slot.

A slot is two choices: how many tokens the decompressor guesses before it, its gap, and which token it names. The gap is
drawn from a head of its own, the token then from the base model's own head. Where units end is not modelled: those that
are written are full.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ztok_fast.codec.config import ZTokConfig

GAPS = 32
"""Gaps that are told apart; longer ones count as the longest."""

END = GAPS
"""A further choice where a gap is chosen: end-of-Z."""


class SlotSpaceHead(nn.Module):
    """Embeddings and heads of the inferencer of a codec of slots."""

    def __init__(self, hidden_size: int, config: ZTokConfig, start: torch.Tensor, embedding_rms: float) -> None:
        super().__init__()
        self.slots = config.num_codebooks
        self.longest = min(GAPS, max(1, config.max_unit_length // self.slots))
        """Gaps that are drawn: a unit of them all is no longer than units may be."""
        self.gap_head = nn.Linear(hidden_size, GAPS + 1)
        # Small, so that untrained gaps are near uniform.
        nn.init.normal_(self.gap_head.weight, std=0.02 / hidden_size**0.5)
        nn.init.zeros_(self.gap_head.bias)
        # Zeros: at first a slot is read, and the next one predicted, as the base model does with text.
        self.gap_rows = nn.Parameter(torch.zeros(GAPS, hidden_size))
        self.gap_biases = nn.Parameter(torch.zeros(GAPS, hidden_size))
        # Rows that mark: the start of a Z sequence, the start of a question, the start of an answer.
        marks = torch.randn(3, hidden_size) * embedding_rms
        marks[0] = start.detach()
        self.marks = nn.Parameter(marks)

    def rows(self, words: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
        """Input rows ``[S, D]`` of slots: the base's embeddings of their tokens, ``[S, D]``, and int64 ``[S]`` gaps."""
        return words + nn.functional.embedding(gaps, self.gap_rows)

    def choices(self, logits: torch.Tensor) -> torch.Tensor:
        """Of the gap head's logits ``[B, GAPS + 1]`` those that may be drawn: `longest` gaps, and end-of-Z last."""
        return torch.cat([logits[:, : self.longest], logits[:, END:]], dim=1)

    def loss(self, hidden, gaps, tokens, is_end, logits) -> torch.Tensor:
        """Cross-entropy of the next slots: the mean over rows, in nats.

        Args:
            hidden: ``[N, D]`` states that predict; is_end: bool ``[N]``, rows whose target is end-of-Z. The others
                predict the slots of ``gaps`` and ``tokens``, int64 ``[S]``, in order.
            logits: of the vocabulary, from hidden states.
        """
        chosen = torch.full((len(is_end),), END, dtype=torch.int64, device=hidden.device)
        chosen[~is_end] = gaps
        total = cross_entropy(self.gap_head(hidden.float()), chosen, reduction="sum")
        asked = hidden[~is_end] + nn.functional.embedding(gaps, self.gap_biases).to(hidden.dtype)
        return (total + cross_entropy(logits(asked).float(), tokens, reduction="sum")) / len(hidden)
