"""Training of a reader: the inferencer learns to answer questions, from Z-tokens or, to compare, from the text."""

from __future__ import annotations

import torch
from torch import nn

from ztok_fast.codec.layout import offsets
from ztok_fast.codec.selection import choose_ztokens
from ztok_fast.codec.slot_model import SlotModel
from ztok_fast.train.batches import Batch, Section, make_batch
from ztok_fast.train.inferencer import answer_loss
from ztok_fast.train.slot_objective import READ_RATIOS, draw_ratios


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
            seed: of the draw of ratios.
        """
        model = self.model
        asked = [section for section in batch.sections if section.answer]
        if not asked:
            return {"total": 0.0 * model.zspace.marks.sum(), "ztokens": torch.tensor(0)}
        batch = make_batch(asked, model.config.segment_length).to(model.device)
        if self.from_text:
            rows, cu_rows = model.adapted.embedding(batch.tokens), _text_offsets(asked).to(model.device)
        else:
            ratios = draw_ratios(READ_RATIOS, len(asked), seed).to(model.device)
            with torch.no_grad():
                z = choose_ztokens(model, batch.tokens, batch.cu_segments, batch.cu_sections, ratios)
            rows, cu_rows = model.inferencer_rows(z)
        loss = answer_loss(model, asked, rows, cu_rows)
        return {"answer": loss, "total": loss, "ztokens": torch.tensor(len(rows))}


def _text_offsets(sections: list[Section]) -> torch.Tensor:
    return offsets(torch.tensor([len(section.tokens) for section in sections]))
