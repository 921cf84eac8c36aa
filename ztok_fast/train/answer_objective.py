"""Training of a reader: the inferencer learns to answer questions, from Z-tokens or, to compare, from the text."""

from __future__ import annotations

import torch
from torch import nn

from ztok_fast.codec.layout import offsets
from ztok_fast.codec.selection import close
from ztok_fast.codec.slot_model import SlotModel
from ztok_fast.codec.slots import fill_slots, slot_mass
from ztok_fast.codec.ztokens import ZTokens
from ztok_fast.train.batches import Batch, Section, make_batch
from ztok_fast.train.inferencer import answer_loss


class AnswerObjective(nn.Module):
    """Cross-entropy of the answers, given what the inferencer reads and the question. All else stays as it is.

    Args:
        from_text: it reads the word embeddings of the text and not Z-tokens: the reader that answers from Z-tokens are
            to be compared with.
    """

    def __init__(self, model: SlotModel, from_text: bool) -> None:
        super().__init__()
        self.model, self.from_text = model, from_text

    def forward(self, batch: Batch, seed: int) -> dict[str, torch.Tensor]:
        """The loss terms, 0-d: ``answer`` in nats a token of the answers, and ``total``, the same.

        Args:
            seed: of the ratio that is drawn, one of the codec's budgets; where an exact copy takes fewer Z-tokens than
                it asks for, it has as few as it can.
        """
        model = self.model
        asked = [section for section in batch.sections if section.answer]
        if not asked:
            return {"total": 0.0 * model.zspace.marks.sum(), "ztokens": torch.tensor(0)}
        batch = make_batch(asked, model.config.segment_length).to(model.device)
        if self.from_text:
            rows, cu_rows = model.adapted.embedding(batch.tokens), _text_offsets(asked).to(model.device)
        else:
            z = self._ztokens(batch, seed)
            rows, cu_rows = model.embed(z).detach(), z.cu_ztokens
        loss = answer_loss(model, asked, rows, cu_rows)
        return {"answer": loss, "total": loss, "ztokens": torch.tensor(len(rows))}

    @torch.no_grad()
    def _ztokens(self, batch: Batch, seed: int) -> ZTokens:
        model, cu, slots = self.model, batch.cu_segments, self.model.config.num_codebooks
        budgets = model.config.budgets
        ratio = budgets[int(torch.randint(len(budgets), (1,), generator=torch.Generator().manual_seed(seed)))]
        written, _ = close(model, batch.tokens, cu, prunings=0)
        held = offsets(written.long())[cu.long()].long().diff()
        units = torch.maximum(-(-held // slots), (cu.diff() / ratio).round().long()).clamp(min=1)
        return fill_slots(batch.tokens, written, cu, batch.cu_sections, slots, slot_mass(written, cu, slots, units))


def _text_offsets(sections: list[Section]) -> torch.Tensor:
    return offsets(torch.tensor([len(section.tokens) for section in sections]))
