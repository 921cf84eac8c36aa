"""Token-level compression and decompression: sections, batches, passes. No text, no files.

The documents here are sections: consecutive segments of a text that share one budget (`ZTokConfig.section_tokens`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import torch

from ztok_fast.codec.autoregressive import write_ztokens
from ztok_fast.codec.decoding import decode_text
from ztok_fast.codec.layout import offsets, split_segments
from ztok_fast.codec.pooled_model import Encoding, PooledModel
from ztok_fast.codec.segment_model import SegmentModel
from ztok_fast.codec.selection import choose_ztokens
from ztok_fast.codec.slot_model import SlotModel
from ztok_fast.codec.ztokens import ZTokens, concatenate, no_documents
from ztok_fast.ops import ragged_gather, ragged_layout

BATCH_TOKENS = 4096
BATCH_SEGMENTS = 128
"""Text tokens of one compression pass, and segments decoded side by side: what bounds the memory. Passes twice as large
are no faster on two cores."""

Progress = Callable[[int], None]
"""Called with the number of text tokens just finished."""

Choose = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]
"""(hidden states ``[R, D]``, what is added to them, their segments) -> tokens int64 ``[R]``"""

Tokens = Sequence[int]
"""Text tokens of one document; an ``array`` takes a ninth of the memory of a list."""


def equal_once(keys: Sequence[Hashable]) -> tuple[Counter, list[int]]:
    """How often each key comes, and where each comes first, in rising order: equal documents are worked on once."""
    first_use = {key: i for i, key in reversed(list(enumerate(keys)))}
    return Counter(keys), sorted(first_use.values())


def batches(sizes: Sequence[int], limit: int) -> list[range]:
    """Consecutive index ranges whose sizes add up to at most ``limit`` (a single larger item stands alone)."""
    found, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > limit:
            found.append(range(start, index))
            start, total = index, 0
        total += size
    if start < len(sizes):
        found.append(range(start, len(sizes)))
    return found


def encode_documents(
    model: PooledModel,
    documents: Sequence[Tokens],
    ratio: float,
    fixed_units: bool | None = None,
    levels: int | None = None,
) -> Encoding:
    """One compression pass over documents that share a ratio, each at most one section long."""
    return model.encode(*_packed(model, documents, ratio, levels), fixed_units)


def emit_documents(
    model: SegmentModel,
    documents: Sequence[Tokens],
    ratio: float,
    fixed_units: bool | None = None,
    levels: int | None = None,
    weights: Sequence[torch.Tensor] | None = None,
) -> ZTokens:
    """The Z-tokens of such documents by the emission that the codec is configured for.

    Args:
        fixed_units: ``True`` for units of ``ratio`` tokens, ``False`` for units by halting mass, both in one pass;
            ``None`` for what is configured.
        weights: for slots, of every document what its tokens weigh (`ztok_fast.codec.focus`); ``None`` for all alike.
    """
    packed = _packed(model, documents, ratio, levels)
    if isinstance(model, SlotModel):
        of_token = None if weights is None else torch.cat(list(weights)).to(model.device)
        return choose_ztokens(model, *packed[:-1], fixed_units=bool(fixed_units), weights=of_token)
    assert isinstance(model, PooledModel)
    if fixed_units is None and model.config.emission == "stop":
        return write_ztokens(model, *packed)
    return model.encode(*packed, fixed_units).z


def pack_tokens(documents: Sequence[Tokens], device) -> torch.Tensor:
    """The tokens of documents one after another, int64 ``[T]``."""
    return torch.tensor([t for d in documents for t in d], dtype=torch.int64, device=device)


def _packed(
    model: SegmentModel, documents: Sequence[Tokens], ratio: float, levels: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """tokens, cu_segments, cu_documents, ratio and levels, as `PooledModel.encode` takes them."""
    segments, counts = split_segments([len(d) for d in documents], model.config.segment_length)
    device = model.device
    return (
        pack_tokens(documents, device),
        offsets(torch.tensor(segments, dtype=torch.int64, device=device)),
        offsets(torch.tensor(counts, dtype=torch.int64, device=device)),
        torch.full((len(documents),), ratio, device=device),
        None if levels is None else torch.full((len(segments),), levels, dtype=torch.int32, device=device),
    )


@torch.inference_mode()
def compress_documents(
    model: SegmentModel,
    documents: Sequence[Tokens],
    ratio: float,
    *,
    fixed_units: bool | None = None,
    levels: int | None = None,
    weights: Sequence[torch.Tensor] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> ZTokens:
    """Compress documents of at most one section, in batches; equal documents of equal weights are compressed once.

    Returns:
        The Z-tokens of all documents, on the CPU.
    """
    keys = [array("q", document).tobytes() for document in documents]
    if weights is not None:
        keys = [key + own.numpy().tobytes() for key, own in zip(keys, weights)]
    uses, unique = equal_once(keys)
    parts = [no_documents(model.config.num_codebooks, isinstance(model, SlotModel))]
    for batch in batches([len(documents[i]) for i in unique], batch_tokens):
        members = [documents[unique[i]] for i in batch]
        own = None if weights is None else [weights[unique[i]] for i in batch]
        parts.append(emit_documents(model, members, ratio, fixed_units, levels, own).to("cpu"))
        if progress:
            progress(sum(len(documents[unique[i]]) * uses[keys[unique[i]]] for i in batch))
    found = concatenate(parts)
    if len(unique) == len(documents):
        return found
    place = {keys[i]: number for number, i in enumerate(unique)}
    return found.select([place[key] for key in keys])


@torch.inference_mode()
def decode_segments(
    model: SegmentModel,
    z: ZTokens,
    forced: Sequence[dict[int, int] | None] | None = None,
    batch_segments: int = BATCH_SEGMENTS,
    vectors: torch.Tensor | None = None,
    choose: Choose | None = None,
) -> list[list[int]]:
    """Write the text tokens of every segment, many segments side by side.

    Args:
        z: Z-tokens on the model's device.
        forced: for each segment a mapping position → token that is written whatever the model says, or ``None``.
        vectors: ``[K, d_z]`` to decode in place of the code vectors.
        choose: finds the tokens in place of the likeliest ones, pass by pass (`write_told`); with the engine only.
    """
    embeddings = model.embed(z, vectors)
    rows, positions, cu_prefix = model.prefix(z)
    start_position = model.config.context_segments * model.config.segment_length
    bounds, device = cu_prefix.tolist(), embeddings.device
    cu_text = z.cu_text.tolist()
    segment_lengths = [b - a for a, b in zip(cu_text[:-1], cu_text[1:])]
    # Segments of like length share a batch, so that short ones do not wait for long ones.
    order = sorted(range(len(segment_lengths)), key=lambda s: -segment_lengths[s])
    conditioning, logit_bias = model.conditioning(embeddings, z, cu_text[-1])
    named = model.written(z)
    written: list[list[int]] = [[] for _ in segment_lengths]
    for begin in range(0, len(order), batch_segments):
        members = [s for s in order[begin : begin + batch_segments] if segment_lengths[s]]
        if not members:
            continue
        own = torch.cat([torch.arange(bounds[s], bounds[s + 1], device=device) for s in members])
        cu_own = offsets(torch.tensor([bounds[s + 1] - bounds[s] for s in members], device=device))
        cu_start = torch.arange(len(members) + 1, dtype=torch.int32, device=device)
        conditions, biases = (_padded_rows(of_text, cu_text, members) for of_text in (conditioning, logit_bias))
        start = model.start_embedding.to(embeddings.dtype).expand(len(members), -1)
        start = start if conditions is None else start + conditions[:, 0]
        joined = ragged_gather([embeddings, start.contiguous()], [rows[own], None], [cu_own, cu_start])
        position_ids = ragged_layout([cu_own, cu_start], [len(own), len(members)]).place(
            [positions[own], positions.new_full((len(members),), start_position)]
        )
        counts = torch.tensor([segment_lengths[s] for s in members], device=device)
        fixed = _padded_rows(named, cu_text, members, -1)
        if forced is not None and any(forced[s] for s in members):
            fixed = torch.full((len(members), int(counts.max())), -1) if fixed is None else fixed.cpu()
            for row, s in enumerate(members):
                for position, token in (forced[s] or {}).items():
                    fixed[row, position] = token
            fixed = fixed.to(device)
        places = torch.tensor(members)

        def choose_own(hidden, bias, texts, columns, places=places):
            assert choose is not None
            return choose(hidden, bias, places[texts])

        tokens = decode_text(
            model.runtime,
            joined.values,
            position_ids,
            joined.cu_seqlens,
            counts,
            start_position,
            fixed,
            conditions,
            biases,
            None if choose is None else choose_own,
        )
        for s, row in zip(members, tokens.tolist()):
            written[s] = row[: segment_lengths[s]]
    return written


def _padded_rows(
    rows: torch.Tensor | None, cu_text: list[int], segments: list[int], padding: float = 0.0
) -> torch.Tensor | None:
    """Packed text rows ``[T, ...]`` of some segments as ``[B, longest, ...]``."""
    if rows is None:
        return None
    own = [rows[cu_text[s] : cu_text[s + 1]] for s in segments]
    return torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=padding)


@torch.inference_mode()
def decompress_documents(
    model: SegmentModel,
    z: ZTokens,
    forced: Sequence[dict[int, int] | None] | None = None,
    *,
    batch_segments: int = BATCH_SEGMENTS,
    progress: Progress | None = None,
) -> list[array]:
    """The text tokens of every document, each at most one section long, in batches.

    Equal documents with equal ``forced`` tokens are decoded once, and share one array.

    Args:
        z: Z-tokens on the CPU.
        forced: for each document a mapping from token position in the document to the token to write there.
    """
    forced = forced or [None] * len(z)
    keys = [(*key, tuple(sorted((f or {}).items()))) for key, f in zip(z.keys(), forced)]
    uses, unique = equal_once(keys)
    counts = z.cu_documents.diff().tolist()
    results: dict[tuple, array] = {}
    for batch in batches([counts[i] for i in unique], batch_segments):
        members = [unique[i] for i in batch]
        own = z.select(members)
        cu_text, cu_segments = own.cu_text.tolist(), own.cu_documents.tolist()
        per_segment: list[dict[int, int]] = [{} for _ in cu_text[1:]]
        for number, i in enumerate(members):
            first = cu_text[cu_segments[number]]
            for position, token in (forced[i] or {}).items():
                segment = bisect_right(cu_text, first + position) - 1
                per_segment[segment][first + position - cu_text[segment]] = token
        written = decode_segments(model, own.to(model.device), per_segment, batch_segments)
        for number, i in enumerate(members):
            segments = written[cu_segments[number] : cu_segments[number + 1]]
            results[keys[i]] = array("i", [t for segment in segments for t in segment])
            if progress:
                progress(len(results[keys[i]]) * uses[keys[i]])
    return [results[key] for key in keys]


@torch.inference_mode()
def teacher_forced(model: SegmentModel, z: ZTokens, tokens: torch.Tensor, vectors: torch.Tensor | None = None):
    """What the decompressor would write given the true prefix.

    Args:
        z: Z-tokens on the model's device; tokens: int64 ``[T]``, the text that they stand for.
        vectors: ``[K, d_z]`` to use in place of the code vectors.

    Returns:
        For all tokens in order: the predicted tokens int64 ``[T]``, the margin fp32 ``[T]`` by which the best logit
        leads the second, and the loss fp32 ``[T]`` in nats. Tokens that the Z-tokens name are written without loss.
    """
    embeddings = model.embed(z, vectors)
    hidden = model.decompressor_hidden(model.decoder_inputs(embeddings, z, tokens, z.cu_text))
    predicted, margins, losses = [], [], []
    for rows, own in zip(hidden.split(model.rows_at_once), tokens.split(model.rows_at_once)):
        logits = model.runtime.logits(rows).float()
        best = logits.topk(2, dim=-1)
        predicted.append(logits.argmax(-1))
        margins.append(best.values[:, 0] - best.values[:, 1])
        losses.append(torch.nn.functional.cross_entropy(logits, own, reduction="none"))
    found, margin, loss = torch.cat(predicted), torch.cat(margins), torch.cat(losses)
    named = model.written(z)
    if named is None:
        return found, margin, loss
    told = named >= 0
    return torch.where(told, named, found), margin.masked_fill(told, torch.inf), loss.masked_fill(told, 0.0)
