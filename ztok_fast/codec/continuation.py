"""Z-space: continuing a document Z-token by Z-token, and answering questions from Z-tokens."""

from __future__ import annotations

import torch

from ztok_fast.codec.engine import DecodeSession, write_answer
from ztok_fast.codec.errors import CodecError
from ztok_fast.codec.layout import joined_rows, offsets, position_in_sequence
from ztok_fast.codec.model import ZTokModel
from ztok_fast.codec.passes import Window
from ztok_fast.codec.zbatch import DocumentInfo, ZBatch


@torch.inference_mode()
def continue_ztokens(
    model: ZTokModel, z: ZBatch, max_new_ztokens: int, temperature: float, top_p: float, seed: int
) -> tuple[list[Window], list[DocumentInfo]]:
    """New Z-tokens for every document, until end-of-Z or ``max_new_ztokens``.

    A continuation is cut into segments of at most ``segment_length`` text tokens, as compression cuts.
    """
    for name, value, low in (("max_new_ztokens", max_new_ztokens, 1), ("temperature", temperature, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= low:
            raise CodecError(f"{name}: expected a number of at least {low}, got {value!r}")
    device = model.codebooks.device
    embeds, position_ids, cu_prefix = _context(model, z)
    count = len(z)
    if not count:
        return [], []
    session = DecodeSession(model.adapted, "inferencer", embeds, position_ids, cu_prefix, max_new_ztokens)
    position = cu_prefix.diff().long()
    row_ids = torch.zeros(count, dtype=torch.int64, device=device)
    chosen_codes, chosen_lengths, alive = [], [], []
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    for step in range(max_new_ztokens):
        codes, lengths, now_ended = model.zspace.select(
            session.last, model.codebooks, temperature=temperature, top_p=top_p, seed=seed, row_ids=row_ids, step=step
        )
        ended = ended | now_ended
        if bool(ended.all()):
            break
        chosen_codes.append(codes)
        chosen_lengths.append(lengths)
        alive.append(~ended)
        if step + 1 < max_new_ztokens:
            session.step(model.z_embeddings(model.dequantize(codes), lengths), position)
            position = position + 1
    return _as_windows(model, z, chosen_codes, chosen_lengths, alive)


def _as_windows(model, z, codes, lengths, alive) -> tuple[list[Window], list[DocumentInfo]]:
    windows, infos = [], []
    for row, source in enumerate(z.documents):
        own = [step for step in range(len(codes)) if bool(alive[step][row])]
        own_codes = [codes[step][row].cpu() for step in own]
        own_lengths = [int(lengths[step][row]) for step in own]
        units, filled = [], model.config.segment_length + 1
        for length in own_lengths:
            if filled + length > model.config.segment_length:
                units.append(0)
                filled = 0
            units[-1] += 1
            filled += length
        stacked = torch.stack(own_codes) if own else torch.zeros(0, model.config.num_codebooks, dtype=torch.int32)
        windows.append(Window(stacked, torch.tensor(own_lengths, dtype=torch.int32), units))
        infos.append(DocumentInfo(tokens=sum(own_lengths), budget=source.budget, levels=model.config.num_codebooks))
    return windows, infos


@torch.inference_mode()
def answer_question(model: ZTokModel, z: ZBatch, questions: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy answers, as token lists, to one question for every document."""
    if not len(z):
        return []
    device = model.codebooks.device
    embeds, _, cu_context = _context(model, z)
    marks = model.zspace.marks.to(embeds.dtype)
    words = model.adapted.embedding(torch.tensor([t for q in questions for t in q], dtype=torch.int64, device=device))
    cu_words = offsets(torch.tensor([len(q) for q in questions], device=device))
    cu_mark = torch.arange(len(z) + 1, dtype=torch.int32, device=device)
    parts = [(embeds, cu_context), (marks[1:2].expand(len(z), -1), cu_mark), (words, cu_words), (marks[2:3].expand(len(z), -1), cu_mark)]
    rows, cu_joined = joined_rows([cu for _, cu in parts], [len(values) for values, _ in parts])
    joined = embeds.new_empty(sum(len(values) for values, _ in parts), embeds.shape[1])
    for (values, _), own in zip(parts, rows):
        joined[own] = values
    end = model.adapted.model.config.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    return write_answer(
        model.adapted, joined, position_in_sequence(cu_joined, len(joined)), cu_joined, max_new_tokens, ends
    )


def _context(model: ZTokModel, z: ZBatch):
    """Packed inferencer inputs: the start mark and the Z-tokens of every document, at running positions."""
    device = model.codebooks.device
    embeddings = model.z_embeddings(model.dequantize(z.codes.to(device)), z.unit_lengths.to(device))
    cu_z = z.cu_ztokens.to(device)
    cu_start = torch.arange(len(z) + 1, dtype=torch.int32, device=device)
    (start_rows, z_rows), cu_joined = joined_rows([cu_start, cu_z], [len(z), z.ztokens])
    joined = embeddings.new_empty(len(z) + z.ztokens, embeddings.shape[1])
    joined[start_rows] = model.zspace.marks[:1].to(joined.dtype)
    joined[z_rows] = embeddings
    return joined, position_in_sequence(cu_joined, len(joined)), cu_joined
