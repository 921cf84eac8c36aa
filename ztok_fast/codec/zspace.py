"""Z-space language modelling: the next Z-token, code by code, and the length of its unit.

One Z-token is L codes. They are predicted one after another from one hidden state, each level seeing the
codes chosen before it, which costs L small dot products with the codebook rows and no further pass through
the model. Level 0 has one more row, end-of-Z.
"""

from __future__ import annotations

import torch
from torch import nn

from ztok_fast.codec.config import ZTokConfig
from ztok_fast.ops import z_select


class ZSpaceHead(nn.Module):
    """Embeddings and heads of the inferencer."""

    def __init__(self, hidden_size: int, config: ZTokConfig, embedding_rms: float) -> None:
        super().__init__()
        latent = config.latent_dim
        # Small, so that an untrained head is near uniform: hidden states of some bases are long, and logits to match
        # would start the loss far above log V and let it dominate the clipped gradient.
        self.queries = nn.Parameter(torch.randn(config.num_codebooks, latent, hidden_size) * (0.02 / hidden_size**0.5))
        self.end_row = nn.Parameter(torch.zeros(1, latent))
        self.length_query = nn.Linear(hidden_size, config.max_unit_length)
        self.length_of_codes = nn.Linear(latent, config.max_unit_length, bias=False)
        # Rows that mark: the start of a Z sequence, the start of a question, the start of an answer.
        self.marks = nn.Parameter(torch.randn(3, hidden_size) * embedding_rms)

    def level_query(self, hidden: torch.Tensor, level: int, chosen: torch.Tensor) -> torch.Tensor:
        """Query ``[N, d_z]`` of one level from hidden ``[N, D]`` and the sum of the codes chosen so far."""
        return hidden @ self.queries[level].T.to(hidden.dtype) + chosen

    def level_rows(self, codebooks: torch.Tensor, level: int) -> torch.Tensor:
        """The rows a level chooses among: its codebook, and at level 0 the end-of-Z row, last."""
        return torch.cat([codebooks[0], self.end_row]) if level == 0 else codebooks[level]

    def length_logits(self, hidden: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, max_unit_length]`` of unit lengths 1…max from hidden states and code vectors."""
        return self.length_query(hidden) + self.length_of_codes(vectors)

    def loss(self, hidden, codes, lengths, is_end, codebooks) -> torch.Tensor:
        """Cross-entropy of the next Z-tokens, codes and unit length together: the mean over rows, in nats.

        Args:
            hidden: ``[N, D]`` states that predict; codes int ``[N, L]`` (-1: level not used), lengths ``[N]``.
            is_end: bool ``[N]``, rows whose target is end-of-Z.
            codebooks: ``[L, V, d_z]``; no gradient flows into them.
        """
        codebooks = codebooks.detach()
        hidden = hidden.float()
        chosen = torch.zeros(len(hidden), codebooks.shape[2], device=hidden.device)
        total = hidden.new_zeros(())
        for level in range(codebooks.shape[0]):
            target = codes[:, level].long()
            if level == 0:
                target = torch.where(is_end, codebooks.shape[1], target)
            else:
                target = torch.where(is_end, -1, target)
            logits = self.level_query(hidden, level, chosen) @ self.level_rows(codebooks, level).T
            total = total + nn.functional.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
            used = (target >= 0) & ~is_end
            chosen = chosen + codebooks[level][target.clamp(0, codebooks.shape[1] - 1)] * used[:, None]
        length_target = torch.where(is_end, -1, lengths.long() - 1)
        total = total + nn.functional.cross_entropy(
            self.length_logits(hidden, chosen), length_target, ignore_index=-1, reduction="sum"
        )
        return total / len(hidden)

    @torch.no_grad()
    def end_mass(self, hidden: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
        """Probability fp32 ``[B]`` that a row's next Z-token is end-of-Z: the halting mass of the mode "stop"."""
        query = self.level_query(hidden.float(), 0, hidden.new_zeros(codebooks.shape[2], dtype=torch.float32))
        return (query @ self.level_rows(codebooks, 0).T).softmax(-1)[:, -1]

    @torch.no_grad()
    def select(self, hidden, codebooks, *, temperature, top_p, seed, row_ids, step, allow_end=True):
        """Choose the next Z-token of every row.

        Args:
            hidden: ``[B, D]``; row_ids int64 ``[B]``, step: what the random bits of a row's draw depend on, with
                ``seed``; temperature, top_p as in `z_select`.
            allow_end: let end-of-Z be drawn like a code.

        Returns:
            codes int32 ``[B, L]``, lengths int32 ``[B]``, ended bool ``[B]``.
        """
        hidden = hidden.float()
        chosen = torch.zeros(len(hidden), codebooks.shape[2], device=hidden.device)
        levels, picked = codebooks.shape[0], []
        ended = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        for level in range(levels):
            rows = self.level_rows(codebooks, level) if allow_end else codebooks[level]
            query = self.level_query(hidden, level, chosen)
            # One counter per (step, level), so that no two draws share their random bits.
            code = z_select(query, rows, temperature, top_p, seed, row_ids, step * (levels + 1) + level).codes
            if level == 0 and allow_end:
                ended = code == codebooks.shape[1]
                code = code.clamp(max=codebooks.shape[1] - 1)
            picked.append(code)
            chosen = chosen + codebooks[level][code.long()]
        logits = self.length_logits(hidden, chosen)
        identity = torch.eye(logits.shape[1], device=logits.device)
        length = z_select(logits, identity, temperature, top_p, seed, row_ids, step * (levels + 1) + levels).codes + 1
        return torch.stack(picked, dim=1), length, ended
