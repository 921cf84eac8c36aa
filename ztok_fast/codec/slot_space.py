"""Z-space language modelling over slots: the next Z-token, slot by slot.

A slot is two choices: how many tokens the decompressor guesses before it, and which token it names. The choices of a
Z-token are made one after another from one hidden state, each seeing those before it, as `ZSpaceHead` does for codes.
"""

from __future__ import annotations

import torch
from torch import nn

from ztok_fast.codec.config import ZTokConfig
from ztok_fast.ops import z_select

GAPS = 32
"""Guessed tokens before a slot that are told apart; more count as the most."""

NONE, END = GAPS, GAPS + 1
"""Further choices where a gap is chosen: no slot more in this Z-token; and, at the first, end-of-Z."""


class SlotSpaceHead(nn.Module):
    """Embeddings and heads of the inferencer of a codec of slots."""

    def __init__(self, hidden_size: int, config: ZTokConfig, embedding_rms: float) -> None:
        super().__init__()
        self.slots, latent = config.num_codebooks, config.latent_dim
        self.longest = config.max_unit_length
        # Small, so that an untrained head is near uniform.
        self.queries = nn.Parameter(torch.randn(2 * self.slots, latent, hidden_size) * (0.02 / hidden_size**0.5))
        self.gap_rows = nn.Parameter(torch.randn(self.slots, GAPS + 2, latent) * 0.1)
        self.words = nn.Linear(hidden_size, latent, bias=False)
        # Rows that mark: the start of a Z sequence, the start of a question, the start of an answer.
        self.marks = nn.Parameter(torch.randn(3, hidden_size) * embedding_rms)

    def loss(self, hidden, codes, slot_offsets, is_end, embedding) -> torch.Tensor:
        """Cross-entropy of the next Z-tokens: the mean over rows, in nats.

        Args:
            hidden: ``[N, D]`` states that predict; codes, slot_offsets int ``[N, L]`` as in `ZTokens`.
            is_end: bool ``[N]``, rows whose target is end-of-Z.
            embedding: ``[V, D]`` of the base; no gradient flows into it.
        """
        hidden, rows = hidden.float(), self.words(embedding.detach().float())
        before = torch.nn.functional.pad(slot_offsets, (1, 0), value=-1)[:, :-1]
        chosen = hidden.new_zeros(len(hidden), rows.shape[1])
        total, open_rows = hidden.new_zeros(()), torch.ones_like(is_end)
        for slot in range(self.slots):
            used = codes[:, slot] >= 0
            gap = (slot_offsets[:, slot] - before[:, slot] - 1).clamp(0, GAPS - 1)
            gap = torch.where(used, gap, torch.where(is_end, END, NONE)).long()
            total = total + self._cross_entropy(hidden, 2 * slot, chosen, self._gaps(slot), gap, open_rows)
            open_rows = open_rows & used
            chosen = chosen + self.gap_rows[slot][gap]
            code = codes[:, slot].long()
            total = total + self._cross_entropy(hidden, 2 * slot + 1, chosen, rows, code, open_rows)
            chosen = chosen + rows[code.clamp(min=0)] * open_rows[:, None]
        return total / len(hidden)

    @torch.no_grad()
    def end_mass(self, hidden: torch.Tensor) -> torch.Tensor:
        """Probability fp32 ``[B]`` that a row's next Z-token is end-of-Z: the halting mass of the mode "stop"."""
        return (hidden.float() @ self.queries[0].T @ self.gap_rows[0].T).softmax(-1)[:, END]

    @torch.no_grad()
    def select(self, hidden, embedding, *, temperature, top_p, seed, row_ids, step, allow_end=True):
        """Choose the next Z-token of every row; the arguments are those of `ZSpaceHead.select`.

        Returns:
            codes int32 ``[B, L]``, lengths int32 ``[B]``, slot offsets int32 ``[B, L]``, ended bool ``[B]``.
        """
        hidden, rows = hidden.float(), self.words(embedding.float())
        chosen = hidden.new_zeros(len(hidden), rows.shape[1])
        ended = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        going = ~ended
        place = torch.full((len(hidden),), -1, dtype=torch.int64, device=hidden.device)
        codes, places = [], []

        def draw(level: int, table: torch.Tensor) -> torch.Tensor:
            query = hidden @ self.queries[level].T + chosen
            # One counter per (step, level), so that no two draws share their random bits.
            counter = step * 2 * self.slots + level
            return z_select(query, table, temperature, top_p, seed, row_ids, counter).codes.long()

        for slot in range(self.slots):
            if slot == 0:
                # A Z-token has a slot at least, or ends the sequence.
                keep = [*range(GAPS), END] if allow_end else [*range(GAPS)]
                gap = torch.tensor(keep, device=hidden.device)[draw(0, self.gap_rows[0][keep])]
                ended = gap == END
                gap = torch.where(ended, 0, gap).clamp(max=self.longest - 1)
            else:
                gap = draw(2 * slot, self._gaps(slot))
            going = going & (gap != NONE) & (place + gap + 1 < self.longest)
            chosen = chosen + self.gap_rows[slot][gap]
            code = draw(2 * slot + 1, rows)
            chosen = chosen + rows[code] * going[:, None]
            place = place + torch.where(going, gap + 1, 0)
            codes.append(torch.where(going, code, -1))
            places.append(torch.where(going, place, -1))
        return torch.stack(codes, 1).int(), (place + 1).int(), torch.stack(places, 1).int(), ended

    def _gaps(self, slot: int) -> torch.Tensor:
        """The choices before a slot: end-of-Z comes before the first one alone."""
        return self.gap_rows[slot] if slot == 0 else self.gap_rows[slot][:END]

    def _cross_entropy(self, hidden, level: int, chosen, table, target, used) -> torch.Tensor:
        logits = (hidden @ self.queries[level].T + chosen) @ table.T
        return nn.functional.cross_entropy(logits, torch.where(used, target, -1), ignore_index=-1, reduction="sum")
