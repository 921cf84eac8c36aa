"""Token-level compression and decompression: windows, batches, passes. No text, no files."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ztok_fast.codec.engine import decode_text
from ztok_fast.codec.layout import offsets, split_segments
from ztok_fast.codec.model import Encoded, ZTokModel
from ztok_fast.codec.serial import Written, write_ztokens
from ztok_fast.ops import ragged_gather, ragged_layout

Progress = Callable[[int], None]
"""Called with the number of text tokens just finished."""


@dataclass
class Window:
    """The Z-tokens of one window: consecutive segments of one document under one budget (on the CPU).

    Attributes:
        codes: int32 ``[K, L]``; lengths: int32 ``[K]`` text tokens of each unit.
        units: Z-tokens of every segment.
    """

    codes: torch.Tensor
    lengths: torch.Tensor
    units: list[int]

    @property
    def segment_lengths(self) -> list[int]:
        """Text tokens of every segment."""
        before = offsets(self.lengths).long()
        return before[offsets(torch.tensor(self.units)).long()].diff().tolist()

    def key(self) -> tuple:
        return (self.codes.numpy().tobytes(), self.lengths.numpy().tobytes(), tuple(self.units))


def window_tokens(model: ZTokModel) -> int:
    return model.config.window_segments * model.config.segment_length


def grouped(sizes: Sequence[int], limit: int) -> list[range]:
    """Consecutive index ranges whose sizes add up to at most ``limit`` (a single larger item stands alone)."""
    groups, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > limit:
            groups.append(range(start, index))
            start, total = index, 0
        total += size
    if start < len(sizes):
        groups.append(range(start, len(sizes)))
    return groups


def encode_documents(
    model: ZTokModel,
    documents: list[list[int]],
    ratio: float,
    fixed_units: bool | None = None,
    levels: int | None = None,
) -> Encoded:
    """One compression pass over documents that share a ratio, each at most one window long."""
    return model.encode(*_packed(model, documents, ratio, levels), fixed_units)


def emit_documents(
    model: ZTokModel,
    documents: list[list[int]],
    ratio: float,
    fixed_units: bool | None = None,
    levels: int | None = None,
) -> Written:
    """The Z-tokens of such documents by the emission that the codec is configured for.

    Args:
        fixed_units: ``True`` for units of ``ratio`` tokens, ``False`` for units by halting mass, both in one pass;
            ``None`` for what is configured.
    """
    if fixed_units is None and model.config.emission == "stop":
        return write_ztokens(model, *_packed(model, documents, ratio, levels))
    encoded = encode_documents(model, documents, ratio, fixed_units, levels)
    return Written(encoded.quantized.codes, encoded.lengths, encoded.cu_units)


def _packed(model: ZTokModel, documents: list[list[int]], ratio: float, levels: int | None):
    """tokens, cu_segments, cu_groups, ratio and levels, as :meth:`ZTokModel.encode` takes them."""
    segments, counts = split_segments([len(d) for d in documents], model.config.segment_length)
    device = model.codebooks.device
    return (
        torch.tensor([t for d in documents for t in d], dtype=torch.int64, device=device),
        offsets(torch.tensor(segments, dtype=torch.int64, device=device)),
        offsets(torch.tensor(counts, dtype=torch.int64, device=device)),
        torch.full((len(documents),), ratio, device=device),
        None if levels is None else torch.full((len(segments),), levels, dtype=torch.int32, device=device),
    )


@torch.inference_mode()
def compress_windows(
    model: ZTokModel,
    windows: list[list[int]],
    ratio: float,
    *,
    fixed_units: bool | None = None,
    levels: int | None = None,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> list[Window]:
    """Compress windows of text tokens; equal windows are compressed once."""
    unique = list({tuple(w): None for w in windows})
    done: dict[tuple, Window] = {}
    counts: dict[tuple, int] = {}
    for window in windows:
        counts[tuple(window)] = counts.get(tuple(window), 0) + 1
    for group in grouped([len(w) for w in unique], batch_tokens):
        members = [unique[i] for i in group]
        written = emit_documents(model, [list(m) for m in members], ratio, fixed_units, levels)
        codes, lengths = written.codes.cpu(), written.lengths.cpu()
        cu_units = written.cu_units.tolist()
        segment = 0
        for member in members:
            stop = segment + -(-len(member) // model.config.segment_length)
            first, last = cu_units[segment], cu_units[stop]
            units = [b - a for a, b in zip(cu_units[segment:stop], cu_units[segment + 1 : stop + 1])]
            done[member] = Window(codes[first:last], lengths[first:last], units)
            segment = stop
            if progress:
                progress(len(member) * counts[member])
    return [done[tuple(w)] for w in windows]


def stack_windows(model: ZTokModel, windows: list[Window]):
    """Join windows: vectors ``[K, d_z]``, lengths ``[K]``, cu_units ``[S + 1]``, first_segment ``[S]``, segment lengths."""
    device = model.codebooks.device
    codes = torch.cat([w.codes for w in windows]).to(device)
    lengths = torch.cat([w.lengths for w in windows]).to(device)
    cu_units = offsets(torch.tensor([u for w in windows for u in w.units], dtype=torch.int64, device=device))
    counts = torch.tensor([len(w.units) for w in windows], device=device)
    first = torch.repeat_interleave(offsets(counts)[:-1].long(), counts)
    return model.dequantize(codes), lengths, cu_units, first, [n for w in windows for n in w.segment_lengths]


@torch.inference_mode()
def decode_segments(
    model: ZTokModel, vectors, lengths, cu_units, first_segment, segment_lengths, forced=None, batch_segments: int = 128
) -> list[list[int]]:
    """Write the text tokens of every segment, many segments side by side.

    Args:
        vectors: ``[K, d_z]``; lengths int32 ``[K]``; cu_units int32 ``[S + 1]``; first_segment int64 ``[S]``.
        segment_lengths: text tokens to write for each segment.
        forced: for each segment a mapping position → token that is written whatever the model says, or ``None``.
    """
    embeddings = model.z_embeddings(vectors, lengths)
    rows, positions, cu_prefix = model.prefix(embeddings, lengths, cu_units, first_segment)
    start_position = model.config.context_segments * model.config.segment_length
    bounds, device = cu_prefix.tolist(), vectors.device
    # Segments of like length share a batch, so that short ones do not wait for long ones.
    order = sorted(range(len(segment_lengths)), key=lambda s: -segment_lengths[s])
    cu_text = offsets(torch.tensor(segment_lengths, dtype=torch.int64)).tolist()
    conditioning, evidence = model.conditioning(embeddings, lengths, cu_text[-1])
    written: list[list[int]] = [[] for _ in segment_lengths]
    for begin in range(0, len(order), batch_segments):
        members = [s for s in order[begin : begin + batch_segments] if segment_lengths[s]]
        if not members:
            continue
        own = torch.cat([torch.arange(bounds[s], bounds[s + 1], device=device) for s in members])
        cu_own = offsets(torch.tensor([bounds[s + 1] - bounds[s] for s in members], device=device))
        cu_start = torch.arange(len(members) + 1, dtype=torch.int32, device=device)
        told, added = (_padded_rows(rows_of_text, cu_text, members) for rows_of_text in (conditioning, evidence))
        start = model.start_embedding.to(embeddings.dtype).expand(len(members), -1)
        start = start if told is None else start + told[:, 0]
        joined = ragged_gather([embeddings, start.contiguous()], [rows[own], None], [cu_own, cu_start])
        position_ids = ragged_layout([cu_own, cu_start], [len(own), len(members)]).place(
            [positions[own], positions.new_full((len(members),), start_position)]
        )
        counts = torch.tensor([segment_lengths[s] for s in members], device=device)
        fixed = None
        if forced is not None and any(forced[s] for s in members):
            fixed = torch.full((len(members), int(counts.max())), -1, dtype=torch.int64)
            for row, s in enumerate(members):
                for position, token in (forced[s] or {}).items():
                    fixed[row, position] = token
            fixed = fixed.to(device)
        tokens = decode_text(
            model.adapted, joined.values, position_ids, joined.cu_seqlens, counts, start_position, fixed, told, added
        )
        for s, row in zip(members, tokens.tolist()):
            written[s] = row[: segment_lengths[s]]
    return written


def _padded_rows(rows: torch.Tensor | None, cu_text: list[int], segments: list[int]) -> torch.Tensor | None:
    """Packed text rows of some segments as ``[B, longest, D]``."""
    if rows is None:
        return None
    return torch.nn.utils.rnn.pad_sequence([rows[cu_text[s] : cu_text[s + 1]] for s in segments], batch_first=True)


@torch.inference_mode()
def decompress_windows(
    model: ZTokModel,
    windows: list[Window],
    forced: list[dict[int, int] | None] | None = None,
    *,
    batch_segments: int = 128,
    progress: Progress | None = None,
) -> list[list[int]]:
    """The text tokens of every window; equal windows with equal ``forced`` tokens are decoded once.

    Args:
        forced: for each window a mapping from token position in the window to the token to write there.
    """
    forced = forced or [None] * len(windows)
    keys = [(w.key(), tuple(sorted((f or {}).items()))) for w, f in zip(windows, forced)]
    uses = Counter(keys)
    first_use = {key: i for i, key in reversed(list(enumerate(keys)))}
    unique = sorted(first_use.values())
    results: dict[tuple, list[int]] = {}
    for group in grouped([len(windows[i].units) for i in unique], batch_segments):
        members = [unique[i] for i in group]
        stacked = stack_windows(model, [windows[i] for i in members])
        per_segment: list[dict[int, int]] = []
        for i in members:
            before = offsets(torch.tensor(windows[i].segment_lengths)).tolist()
            own: list[dict[int, int]] = [{} for _ in windows[i].units]
            for position, token in (forced[i] or {}).items():
                segment = bisect_right(before, position) - 1
                own[segment][position - before[segment]] = token
            per_segment += own
        pieces = decode_segments(model, *stacked, per_segment, batch_segments)
        at = 0
        for i in members:
            count = len(windows[i].units)
            results[keys[i]] = [t for piece in pieces[at : at + count] for t in piece]
            at += count
            if progress:
                progress(len(results[keys[i]]) * uses[keys[i]])
    return [results[key] for key in keys]


@torch.inference_mode()
def teacher_forced(model: ZTokModel, windows: list[Window], documents: list[list[int]]):
    """What the decompressor would write given the true prefix.

    Returns:
        For all tokens of ``documents`` (one per window) in order: the predicted tokens int64 ``[T]``, the
        margin fp32 ``[T]`` by which the best logit leads the second, and the loss fp32 ``[T]`` in nats.
    """
    device = model.codebooks.device
    vectors, lengths, cu_units, first, segment_lengths = stack_windows(model, windows)
    tokens = torch.tensor([t for d in documents for t in d], dtype=torch.int64, device=device)
    cu_segments = offsets(torch.tensor(segment_lengths, device=device))
    return predict_tokens(model, vectors, lengths, cu_units, first, tokens, cu_segments)


@torch.inference_mode()
def predict_tokens(model: ZTokModel, vectors, lengths, cu_units, first_segment, tokens, cu_segments):
    """:func:`teacher_forced` on tensors that are already packed."""
    embeddings = model.z_embeddings(vectors, lengths)
    inputs = model.decoder_inputs(embeddings, lengths, cu_units, first_segment, tokens, cu_segments)
    hidden = model.decompressor_hidden(inputs)
    predicted, margins, losses = [], [], []
    for start in range(0, len(tokens), 4096):
        logits = model.adapted.logits(hidden[start : start + 4096]).float()
        best = logits.topk(2, dim=-1)
        predicted.append(logits.argmax(-1))
        margins.append(best.values[:, 0] - best.values[:, 1])
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[start : start + 4096], reduction="none"))
    return torch.cat(predicted), torch.cat(margins), torch.cat(losses)
