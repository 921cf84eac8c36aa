"""Evaluation of a codec: accuracy given the true prefix and free-running, ratio, rate, the text's own bits."""

from __future__ import annotations

import math

import torch

from ztok_fast.codec.layout import offsets, position_in_sequence, sequence_of_row, split_segments
from ztok_fast.codec.passes import (
    BATCH_TOKENS,
    batches,
    decode_segments,
    emit_documents,
    encode_documents,
    pack_tokens,
    teacher_forced,
)
from ztok_fast.train.text_data import iter_texts


def dev_documents(files, tokenizer, documents: int, tokens: int, exclude_sources=()) -> list[list[int]]:
    """Token documents for evaluation: the first ``tokens`` tokens of up to ``documents`` texts of the files."""
    for name, value in (("documents", documents), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"evaluation {name}: expected at least 1, got {value}")
    rows = [t for t in iter_texts(files, exclude_sources) if t.strip()]
    if not rows:
        return []
    stride = max(1, len(rows) // documents)
    chosen = rows[::stride][:documents]
    ids = tokenizer([t[: 16 * tokens] for t in chosen], add_special_tokens=False)["input_ids"]
    return [d[:tokens] for d in ids if d]


@torch.inference_mode()
def evaluate(
    codec,
    documents: list[list[int]],
    budgets: list[float],
    *,
    quantized: bool = True,
    fixed_units: bool | None = None,
    levels: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, dict]:
    """Accuracy, ratio and rate at every budget.

    Args:
        documents: token lists, each cut to one section (see ``section_segments``).
        quantized: decode from the codes; otherwise from the continuous latents (before k-means).
        fixed_units: units of r tokens, or learned ones if false; ``None`` for units as configured.
        levels: use only the first ``levels`` residual levels.

    Returns:
        For each budget (as a string): ``teacher_forced`` and ``free_running`` accuracy in [0, 1],
        ``ratio`` achieved, ``rate`` in bits per text token, ``loss_bits`` (cross-entropy given Z and the true
        prefix, bits per token), ``length_surprisal_correlation`` (Pearson, between a unit's length and the mean
        surprisal of its tokens under the bare base model; negative when dense text gets shorter units); and
        under ``"base"`` the bare model on the same segments: ``bits_per_token`` and ``accuracy``.

    Raises:
        ValueError: no document holds text, or a budget that no allocation can reach.
    """
    model, config = codec.model, codec.model.config
    budgets = [config.check_ratio(budget) for budget in budgets]
    documents = [d[: config.section_tokens] for d in documents if d]
    if not documents:
        raise ValueError("evaluation: expected at least one document with text, got none")
    surprisals, base_hits, base_count = [], 0, 0
    members_of_batch = [[documents[i] for i in b] for b in batches([len(d) for d in documents], batch_tokens)]
    for members in members_of_batch:
        tokens, cu_segments = _pack(members, config.segment_length, model.device)
        surprisals.append(model.surprisal(tokens, cu_segments))
        hits, count = _base_hits(model, tokens, cu_segments)
        base_hits, base_count = base_hits + hits, base_count + count
    report: dict[str, dict] = {
        "base": {
            "bits_per_token": torch.cat(surprisals).mean().item(),
            "accuracy": base_hits / max(1, base_count),
        }
    }
    for budget in budgets:
        forced_hits = free_hits = total = units = 0
        loss, unit_bits, unit_tokens = 0.0, [], []
        for members, bits in zip(members_of_batch, surprisals):
            tokens = pack_tokens(members, model.device)
            if quantized:
                z, vectors = emit_documents(model, members, budget, fixed_units, levels), None
            else:
                encoded = encode_documents(model, members, budget, fixed_units, levels)
                z, vectors = encoded.z, encoded.quantized.latents
            predicted, _, losses = teacher_forced(model, z, tokens, vectors)
            free = pack_tokens(decode_segments(model, z, vectors=vectors), tokens.device)
            forced_hits += int((predicted == tokens).sum())
            free_hits += int((free == tokens).sum())
            loss += losses.sum().item()
            total, units = total + len(tokens), units + z.ztokens
            of_unit = sequence_of_row(offsets(z.unit_lengths), len(tokens))
            sums = torch.zeros(z.ztokens, device=tokens.device).index_add_(0, of_unit, bits)
            unit_bits.append(sums / z.unit_lengths)
            unit_tokens.append(z.unit_lengths.float())
        report[f"{budget:g}"] = {
            "teacher_forced": forced_hits / total,
            "free_running": free_hits / total,
            "ratio": total / units,
            "rate": units * _bits(config, levels) / total,
            "loss_bits": loss / total / math.log(2),
            "length_surprisal_correlation": _correlation(torch.cat(unit_tokens), torch.cat(unit_bits)),
        }
    return report


def _bits(config, levels: int | None) -> float:
    used = config.num_codebooks if levels is None else levels
    return used * math.log2(config.codebook_size) + math.log2(config.max_unit_length)


def _pack(documents: list[list[int]], segment_length: int, device):
    segments, _ = split_segments([len(d) for d in documents], segment_length)
    return pack_tokens(documents, device), offsets(torch.tensor(segments, device=device))


def _base_hits(model, tokens, cu_segments) -> tuple[int, int]:
    """Right next-token guesses of the bare model within the segments, and how many there were."""
    total = len(tokens)
    position = position_in_sequence(cu_segments, total)
    hidden = model.adapted(
        model.adapted.embedding(tokens), position, cu_segments, int(cu_segments.diff().max()), adapter=None
    )
    inner = position[1:] > 0
    guesses = (
        torch.cat([model.adapted.logits(h).argmax(-1) for h in hidden[:-1].split(model.rows_at_once)])
        if total > 1
        else tokens[:0]
    )
    return int(((guesses == tokens[1:]) & inner).sum()), int(inner.sum())


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if scale > 0 else 0.0
