"""Writing text token by token, many sequences side by side."""

from __future__ import annotations

import itertools

import torch

from ztok_fast.codec.runtime import Runtime
from ztok_fast.engine.draft import Choose
from ztok_fast.profiling import count_rows


@torch.inference_mode()
def decode_text(
    runtime: Runtime,
    embeds,
    position_ids,
    cu_seqlens,
    lengths: torch.Tensor,
    first_position: int,
    forced: torch.Tensor | None = None,
    conditioning: torch.Tensor | None = None,
    logit_bias: torch.Tensor | None = None,
    choose: Choose | None = None,
    adapter: str = "decompressor",
) -> torch.Tensor:
    """Write ``lengths[b]`` text tokens for every sequence, greedily.

    Args:
        embeds, position_ids, cu_seqlens: packed prefixes, the start row last.
        lengths: int64 ``[B]`` tokens to write, in falling order; first_position: position id of the start row.
        forced: int64 ``[B, max(lengths)]``, tokens to write instead of the model's own; -1 where there is none. Where
            they are many, the engine reads them in the passes of the tokens to guess: there is no step for each.
        conditioning: ``[B, max(lengths), D]``, added to the input row that writes each column (the start rows
            in ``embeds`` have theirs already).
        logit_bias: ``[B, max(lengths), D]``, added to the hidden state that predicts each column.
        choose: finds the tokens in place of the likeliest ones, as in `write_told`; with the engine only.
        adapter: the model that writes.

    Returns:
        int64 ``[B, max(lengths)]``; columns past a sequence's length are meaningless.
    """
    counts = lengths.tolist()
    if any(a < b for a, b in itertools.pairwise(counts)):
        raise ValueError("decode_text: lengths must be in falling order, got one above the one before it")
    longest, going = counts[0], len(counts)
    written = torch.zeros(len(lengths), longest, dtype=torch.int64, device=embeds.device)
    with runtime.session(adapter, embeds, position_ids, cu_seqlens, longest - 1) as session:
        drafted = session.draft(lengths, conditioning, logit_bias, forced, choose)
        if drafted is not None:
            return drafted
        for column in range(longest):
            count_rows(going, len(counts))
            token = runtime.argmax(session.last, None if logit_bias is None else logit_bias[:going, column])
            if forced is not None:
                token = torch.where(forced[:going, column] >= 0, forced[:going, column], token)
            written[:going, column] = token
            if column + 1 < longest:
                # Sequences that are written to their end leave the batch.
                while counts[going - 1] == column + 1:
                    going -= 1
                token = token[:going]
                row = runtime.adapted.embedding(token)
                if conditioning is not None:
                    row = row + conditioning[:going, column + 1]
                session.step(row, torch.full_like(token, first_position + column + 1))
    return written


@torch.inference_mode()
def write_answer(
    runtime: Runtime,
    embeds,
    position_ids,
    cu_seqlens,
    max_new_tokens: int,
    end_tokens: set[int],
    adapter: str | None = "inferencer",
):
    """Greedy continuation under an adapter: a list of token lists, without their end token.

    Args:
        embeds, position_ids, cu_seqlens: packed prefixes, at running positions.
        end_tokens: any of them ends a sequence; ``max_new_tokens`` does at the latest.
    """
    batch = len(cu_seqlens) - 1
    answers: list[list[int]] = [[] for _ in range(batch)]
    open_rows = set(range(batch))
    position = cu_seqlens.diff().long()
    with runtime.session(adapter, embeds, position_ids, cu_seqlens, max_new_tokens) as session:
        for count in range(1, max_new_tokens + 1):
            count_rows(len(open_rows), batch)
            token = runtime.argmax(session.last)
            for row, value in enumerate(token.tolist()):
                if row in open_rows:
                    if value in end_tokens:
                        open_rows.discard(row)
                    else:
                        answers[row].append(value)
            if not open_rows or count == max_new_tokens:
                break
            session.step(runtime.adapted.embedding(token), position)
            position = position + 1
    return answers
