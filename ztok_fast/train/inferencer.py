"""What the inferencer learns: the next Z-token, and answers from Z-tokens."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from ztok_fast.codec.layout import offsets
from ztok_fast.codec.segment_model import SegmentModel
from ztok_fast.codec.ztokens import ZTokens
from ztok_fast.ops import ragged_gather, ragged_layout
from ztok_fast.ops.ragged.ragged_gather import RaggedBatch
from ztok_fast.train.batches import Batch, Section


def inferencer_losses(
    model: SegmentModel, batch: Batch, z: ZTokens, embeddings: torch.Tensor, answers: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cross-entropy of what comes next in every section's Z-tokens, and of the answers where there are some.

    The first is the mean over the rows that predict: the start row, and those that the inferencer reads of Z-tokens.

    Args:
        embeddings: ``[K, D]`` of the Z-tokens ``z``; no gradient flows into them. answers: whether to ask.
    """
    device = batch.tokens.device
    marks = model.zspace.marks
    table, cu_z = model.inferencer_rows(z, embeddings.detach())
    sections, total = len(cu_z) - 1, len(table)
    one_each = torch.arange(sections + 1, dtype=torch.int32, device=device)
    texts = [
        (s.question, [*s.answer, *model.adapted.end_tokens[:1]]) if s.answer and answers else ([], [])
        for s in batch.sections
    ]
    question, cu_question = _pack([q for q, _ in texts], device)
    answer, cu_answer = _pack([a for _, a in texts], device)
    asked = torch.tensor([int(bool(a)) for _, a in texts], device=device)
    cu_mark = offsets(asked)
    mark_count = int(cu_mark[-1])
    words = model.adapted.embedding.weight
    sources = [
        (marks[:1].to(table.dtype), torch.zeros(sections, dtype=torch.int64, device=device), one_each),
        (table, None, cu_z),
        (marks[1:2].to(table.dtype), torch.zeros(mark_count, dtype=torch.int64, device=device), cu_mark),
        (words, question, cu_question),
        (marks[2:3].to(table.dtype), torch.zeros(mark_count, dtype=torch.int64, device=device), cu_mark),
        (words, answer, cu_answer),
    ]
    joined = ragged_gather([s[0] for s in sources], [s[1] for s in sources], [s[2] for s in sources])
    rows = ragged_layout(
        [s[2] for s in sources], [sections, total, mark_count, len(question), mark_count, len(answer)]
    ).destinations
    hidden = _hidden(model, joined)
    # The start row and every Z row predict what comes next, and after the last one the end.
    order = ragged_layout([one_each, cu_z], [sections, total])
    predict = order.place(rows[:2])
    is_end = torch.zeros(sections + total, dtype=torch.bool, device=device)
    is_end[order.cu_seqlens[1:].long() - 1] = True
    zspace = model.zspace_loss(hidden[predict], z, is_end)
    if not len(answer):
        return zspace, None
    # The row before each answer token predicts it: the answer mark first, then the answer's own rows.
    logits = model.adapted.logits(hidden[rows[5] - 1]).float()
    return zspace, cross_entropy(logits, answer)


def answer_loss(
    model: SegmentModel, sections: list[Section], rows: torch.Tensor, cu_rows: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the answers alone, each section's given its rows and its question.

    Args:
        sections: each with an answer; rows: ``[R, D]``, what is read of all of them; cu_rows: int32 offsets.
    """
    device, marks, words = rows.device, model.zspace.marks, model.adapted.embedding.weight
    once = torch.zeros(len(sections), dtype=torch.int64, device=device)
    cu_once = torch.arange(len(sections) + 1, dtype=torch.int32, device=device)
    question, cu_question = _pack([s.question for s in sections], device)
    answer, cu_answer = _pack([[*s.answer, *model.adapted.end_tokens[:1]] for s in sections], device)
    start, ask, reply = (marks[i : i + 1].to(rows.dtype) for i in range(3))
    cu = [cu_once, cu_rows, cu_once, cu_question, cu_once, cu_answer]
    joined = ragged_gather(
        [start, rows, ask, words, reply, words],
        [once, None, once, question, once, answer],
        cu,
    )
    counts = [len(sections), len(rows), len(sections), len(question), len(sections), len(answer)]
    places = ragged_layout(cu, counts).destinations[5]
    hidden = _hidden(model, joined)
    return cross_entropy(model.adapted.logits(hidden[places - 1]).float(), answer)


def _hidden(model: SegmentModel, joined: RaggedBatch) -> torch.Tensor:
    """Hidden states of packed rows under the inferencer."""
    longest = int(joined.cu_seqlens.diff().max())
    return model.adapted(joined.values, joined.position_ids, joined.cu_seqlens, longest, adapter="inferencer")


def _pack(sequences: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    flat = torch.tensor([t for s in sequences for t in s], dtype=torch.int64, device=device)
    return flat, offsets(torch.tensor([len(s) for s in sequences], device=device))
