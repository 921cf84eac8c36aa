"""The choices of Z-tokens of slots as compiled code makes them: with the same bits for a row whatever the others.

docs/determinism.md has the arithmetic. `SlotSpaceHead.select` is the same rule in PyTorch, for devices and models that
the engine does not run; there a draw is by Gumbel noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ztok_fast.codec.slot_space import SlotSpaceHead
from ztok_fast.ops import ordered_linear, ordered_pack
from ztok_fast.ops.zhead.z_select import check_sampling


class SlotChoices:
    """The tables of a head, packed once, and one call of compiled code for each Z-token.

    Args:
        embedding: ``[V, D]`` of the base.
    """

    def __init__(self, head: SlotSpaceHead, embedding: Tensor) -> None:
        self._parameters = (head.queries, head.gap_rows, head.words.weight, embedding)
        self._versions = self._now()
        self._longest = head.longest
        with torch.no_grad():
            words = ordered_pack(head.words.weight.detach().float())
            rows = ordered_linear(embedding.detach().float(), words, head.words.out_features)
            self._tables = (
                ordered_pack(head.queries.detach().float().flatten(0, 1)),
                torch.stack([ordered_pack(own) for own in head.gap_rows.detach().float()]),
                head.gap_rows.detach().float().contiguous(),
                ordered_pack(rows),
                rows,
            )

    @property
    def stale(self) -> bool:
        """The parameters have changed since."""
        return self._now() != self._versions

    def select(
        self,
        hidden: Tensor,
        *,
        temperature: float,
        top_p: float,
        seed: int,
        row_ids: Tensor,
        step: int,
        allow_end: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Choose the next Z-token of every row; the arguments are those of `ZSpaceHead.select`.

        Returns:
            codes int32 ``[B, L]``, lengths int32 ``[B]``, slot offsets int32 ``[B, L]``, and fp64 ``[B]``: 1 where
            end-of-Z was drawn, else 0; without ``allow_end``, its probability.

        Raises:
            ValueError: a number out of its range. RuntimeError: a logit is not finite.
        """
        check_sampling("generate", temperature, top_p, seed, step)
        codes, places, lengths, ends = torch.ops.ztok.engine_slots(
            hidden.float().contiguous(),
            *self._tables,
            self._longest,
            allow_end,
            float(temperature),
            float(top_p),
            seed,
            row_ids,
            step,
        )
        return codes, lengths, places, ends

    def _now(self) -> tuple[int, ...]:
        return tuple(own._version for own in self._parameters)
