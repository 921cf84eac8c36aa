"""How likely each token is to be written, and which: what prices Z-tokens of slots in a file.

A file stores Z-tokens as symbols, one for every text token: *guessed*, or the token that a slot names. The compressor's
language model says how likely each symbol is after those before it. It reads a *draft* of the text: the written tokens,
and its own best guess at the others.
"""

from __future__ import annotations

import torch
from torch import nn

SHARES = 16
"""Shares of a document's tokens that are written, as they are told apart."""

LOWERED = 3.0
"""By how much an untrained head lowers the logit of the best guess where a token is written."""


class DraftHead(nn.Module):
    """Input rows and symbol logits of the draft.

    Args:
        start: ``[D]``, what the row before a segment's first token begins as.
    """

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        width = len(start)
        self.start = nn.Parameter(start.detach().clone().float())
        # Nothing is added at first: the base model reads the draft as any text.
        self.written = nn.Parameter(torch.zeros(2, width))
        self.shares = nn.Parameter(torch.zeros(SHARES, width))
        self.choice = nn.Linear(width, 2)
        nn.init.zeros_(self.choice.weight)
        with torch.no_grad():
            self.choice.bias.copy_(torch.tensor([0.0, LOWERED]))

    def starts(self, share: torch.Tensor) -> torch.Tensor:
        """The rows ``[B, D]`` that predict the first tokens of segments whose shares are int64 ``[B]``."""
        return self.start + self.shares[share]

    def told(self, written: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """What is added to the embedding of a draft's token in the row after it, ``[..., D]``.

        Args:
            written: bool ``[...]``, whether the token is; share: int64 ``[...]``, of its document.
        """
        return self.written[written.long()] + self.shares[share]

    def symbols(self, logits: torch.Tensor, choice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the symbols of rows, and the guesses.

        Args:
            logits: fp32 ``[B, V]`` of the draft's next token; choice: fp32 ``[B, 2]``, `choice` of the hidden states.

        Returns:
            ``[B, V + 1]``, the last of them for *guessed*: as likely as the best guess, but for ``choice[:, 0]``.
            Where a token is written, the best guess is less likely by ``choice[:, 1]``. Guesses int64 ``[B]``.
        """
        best = logits.argmax(1, keepdim=True)
        guessed = logits.gather(1, best) + choice[:, :1]
        lowered = logits.scatter_add(1, best, -choice[:, 1:])
        return torch.cat([lowered, guessed], 1), best[:, 0]


def share_of(written: torch.Tensor, document: torch.Tensor, documents: int) -> torch.Tensor:
    """Which of the `SHARES` every document has, int64 ``[documents]``.

    Args:
        written: bool ``[T]``; document: int64 ``[T]``, of every token.
    """
    held = document[written].bincount(minlength=documents)
    return (held * SHARES // document.bincount(minlength=documents).clamp(min=1)).clamp(max=SHARES - 1)
