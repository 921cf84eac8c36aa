"""Z-space: continuing a document Z-token by Z-token, and answering questions from Z-tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ztok_fast.codec.decoding import write_answer
from ztok_fast.codec.documents import DocumentInfo
from ztok_fast.codec.emission import steps_before_stop
from ztok_fast.codec.errors import CodecError
from ztok_fast.codec.layout import offsets
from ztok_fast.codec.segment_model import SegmentModel
from ztok_fast.codec.zbatch import ZBatch
from ztok_fast.codec.ztokens import ZTokens, concatenate, no_documents
from ztok_fast.ops import ragged_gather
from ztok_fast.profiling import HEAD, count_rows, measuring, stage


@torch.inference_mode()
def continue_ztokens(
    model: SegmentModel,
    z: ZBatch,
    max_new_ztokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    end_threshold: float | None = None,
) -> tuple[ZTokens, list[DocumentInfo]]:
    """New Z-tokens for every document, until end-of-Z or ``max_new_ztokens``.

    A continuation is cut into segments of at most ``segment_length`` text tokens, as compression cuts.

    Args:
        end_threshold: ``None`` lets end-of-Z be drawn like any code. A probability in (0, 1] ends a document at the
            first step whose end-of-Z mass reaches it instead, whatever is drawn: the halting mode "stop"
            (`halting_units`; adaptive computation time, arXiv:1603.08983).
    """
    check_count("max_new_ztokens", max_new_ztokens)
    if not _is_number(temperature) or not 0 <= temperature < math.inf:
        raise CodecError(f"temperature: expected a finite number of at least 0, got {temperature!r}")
    if end_threshold is not None and (not _is_number(end_threshold) or not 0 < end_threshold <= 1):
        raise CodecError(f"end_threshold: expected None or a probability in (0, 1], got {end_threshold!r}")
    device = model.device
    embeds, position_ids, cu_prefix = _context(model, z)
    count = len(z)
    if not count:
        return no_documents(model.config.num_codebooks, z.slot_offsets is not None), []
    steps = max_new_ztokens * model.steps_per_ztoken
    check_positions(model, cu_prefix, steps - 1)
    position = cu_prefix.diff().long()
    # One id for all: a document's draws depend on the seed alone, not on its place in the batch.
    row_ids = torch.zeros(count, dtype=torch.int64, device=device)
    chosen: list[ZTokens] = []
    masses = []
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    with model.runtime.session("inferencer", embeds, position_ids, cu_prefix, steps) as session:
        for step in range(steps):
            if measuring():
                count_rows(count - int(ended.sum()), count)
            with stage(HEAD):
                following, mass, rows = model.next_row(
                    session.last,
                    temperature=temperature,
                    top_p=top_p,
                    seed=seed,
                    row_ids=row_ids,
                    step=step,
                    allow_end=end_threshold is None,
                )
            chosen.append(following)
            masses.append(mass)
            ended = ended | (mass >= (end_threshold or 1.0))
            if bool(ended.all()):
                break
            if step + 1 < steps:
                session.step(rows, position)
                position = position + 1
    kept = steps_before_stop(torch.stack(masses, dim=1), end_threshold or 1.0)
    return _as_documents(model, z, [step.to("cpu") for step in chosen], kept.cpu().long())


def check_count(name: str, value: object) -> None:
    """Raise `CodecError` unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CodecError(f"{name}: expected an integer of at least 1, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_positions(model: SegmentModel, cu_prefix: torch.Tensor, new_rows: int) -> None:
    """Raise `CodecError` where prefixes and new rows do not fit the base's learned position table."""
    limit = model.adapted.position_limit
    if limit is None:
        return
    needed = int(cu_prefix.diff().max()) + new_rows
    if needed > limit:
        raise CodecError(
            f"Z-tokens: expected at most {limit} rows with what is to be written (the base's positions), got {needed}"
        )


def _as_documents(model, z, steps: list[ZTokens], kept: torch.Tensor) -> tuple[ZTokens, list[DocumentInfo]]:
    """The Z-tokens of the first ``kept`` steps of every row, cut into segments, and what is known of each document."""
    documents, infos = [], []
    lengths = torch.stack([step.unit_lengths for step in steps], dim=1)
    codes = torch.stack([step.codes for step in steps], dim=1)
    places = None
    if steps[0].slot_offsets is not None:
        codes, lengths, places, kept = _join_slots(codes[..., 0], lengths, kept, model.steps_per_ztoken)
    for row, (source, count) in enumerate(zip(z.documents, kept.tolist())):
        own_lengths = lengths[row, :count].tolist()
        units, filled = [], model.config.segment_length + 1
        for length in own_lengths:
            if filled + length > model.config.segment_length:
                units.append(0)
                filled = 0
            units[-1] += 1
            filled += length
        segments = torch.tensor([0, len(units)], dtype=torch.int32)
        cu_segments = offsets(torch.tensor(units, dtype=torch.int64))
        own = torch.tensor(own_lengths, dtype=torch.int32)
        own_places = None if places is None else places[row, :count]
        documents.append(ZTokens(codes[row, :count], own, cu_segments, segments, own_places))
        infos.append(DocumentInfo(tokens=sum(own_lengths), budget=source.budget, levels=model.config.num_codebooks))
    return concatenate(documents), infos


def _join_slots(codes, lengths, kept, slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Z-tokens of ``slots`` slots each from steps that wrote one slot each.

    Args:
        codes, lengths: ``[B, steps]``, a slot's token, and one more than its gap; kept: int64 ``[B]``, steps to keep.

    Returns:
        codes int32 ``[B, K, slots]``, unit lengths ``[B, K]``, slot offsets int32 ``[B, K, slots]``, and int64 ``[B]``,
        Z-tokens to keep.
    """
    used = torch.arange(codes.shape[1]) < kept[:, None]
    missing = -codes.shape[1] % slots
    codes, lengths, used = (
        torch.nn.functional.pad(own, (0, missing)).unflatten(1, (-1, slots)) for own in (codes, lengths, used)
    )
    places = (lengths * used).cumsum(2)
    unused = ~used
    return (
        codes.masked_fill(unused, -1),
        places[..., -1].int(),
        (places - 1).masked_fill(unused, -1).int(),
        -(-kept // slots),
    )


@torch.inference_mode()
def answer_question(
    model: SegmentModel, z: ZBatch, questions: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Greedy answers, as token lists, to one question for every document."""
    if not len(z):
        return []
    own = z.to(model.device)
    return answer_from_rows(model, *model.inferencer_rows(own), questions, max_new_tokens)


@torch.inference_mode()
def answer_from_rows(
    model: SegmentModel, rows: torch.Tensor, cu_rows: torch.Tensor, questions: Sequence[Sequence[int]], max_new_tokens
) -> list[list[int]]:
    """`answer_question` from any input embeddings ``[R, D]``, such as those of Z-tokens; int32 offsets ``[B + 1]``."""
    count = len(questions)
    if not count:
        return []
    device, marks = model.device, model.zspace.marks.to(rows.dtype)
    words = model.adapted.embedding(torch.tensor([t for q in questions for t in q], dtype=torch.int64, device=device))
    cu_words = offsets(torch.tensor([len(q) for q in questions], device=device))
    cu_once = torch.arange(count + 1, dtype=torch.int32, device=device)
    once = torch.zeros(count, dtype=torch.int64, device=device)
    joined = ragged_gather(
        [marks[:1], rows, marks[1:2], words.to(rows.dtype), marks[2:3]],
        [once, None, once, None, once],
        [cu_once, cu_rows, cu_once, cu_words, cu_once],
    )
    check_positions(model, joined.cu_seqlens, max_new_tokens - 1)
    return write_answer(
        model.runtime,
        joined.values,
        joined.position_ids,
        joined.cu_seqlens,
        max_new_tokens,
        set(model.adapted.end_tokens),
    )


def _context(model: SegmentModel, z: ZBatch):
    """Packed inferencer inputs: the start mark and the Z-tokens of every document, at running positions."""
    device = model.device
    embeddings, cu_z = model.inferencer_rows(z.to(device))
    cu_start = torch.arange(len(z) + 1, dtype=torch.int32, device=device)
    once = torch.zeros(len(z), dtype=torch.int64, device=device)
    joined = ragged_gather([model.zspace.marks[:1].to(embeddings.dtype), embeddings], [once, None], [cu_start, cu_z])
    return joined.values, joined.position_ids, joined.cu_seqlens
