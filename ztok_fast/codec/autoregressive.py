"""Emission "stop": the compressor writes the Z-tokens of a segment one after another until end-of-Z.

The compressor adapter reads the segment's text and goes on with Z-tokens, each chosen among the codebook rows by a
head of its own (`ZSpaceHead`), as arXiv:2603.25340 writes them. It takes as many steps
as a segment has Z-tokens, where the other emissions take one pass; the segments of a batch run side by side. What to
write is learned from the one-pass emission: the training targets are the codes and units that the quantiser gave for
the same text.

The row that writes a unit has the position id of the unit's first text token. The text position is then given, and need
not be learned.
"""

from __future__ import annotations

import torch

from ztok_fast.codec.emission import steps_before_stop
from ztok_fast.codec.layout import offsets, position_in_sequence, sequence_of_row
from ztok_fast.codec.pooled_model import PooledModel
from ztok_fast.codec.ztokens import ZTokens
from ztok_fast.ops import ragged_gather, ragged_layout

STOP_THRESHOLD = 0.5
"""Mass (probability) of end-of-Z at which a segment ends."""


@torch.inference_mode()
def write_ztokens(
    model: PooledModel, tokens, cu_segments, cu_documents, ratio, levels: torch.Tensor | None = None
) -> ZTokens:
    """Write the Z-tokens of packed segments, greedily; the arguments are those of `PooledModel.encode`.

    A segment ends at the first step whose mass of end-of-Z reaches `STOP_THRESHOLD`, and its last unit takes in
    what text is left; so end-of-Z counts only where that fits one unit, and where no text is left it is certain. A unit
    never reaches past its segment.
    """
    config, device, head = model.config, tokens.device, model.autoregressive
    assert head is not None  # emission "stop" has it
    text = cu_segments.diff().long()
    if not len(text):
        empty = torch.zeros(0, dtype=torch.int32, device=device)
        return ZTokens(empty.reshape(0, config.num_codebooks), empty, offsets(empty), cu_documents)
    _, conditioned, _ = model.compressor_inputs(tokens, cu_segments, cu_documents, ratio)
    values, position_ids, cu_prefix, _ = _rows(model, conditioned, cu_segments)
    longest = int(text.max())
    row_ids = torch.zeros(len(text), dtype=torch.int64, device=device)
    covered, last = torch.zeros_like(text), torch.zeros_like(text)
    codes, lengths, masses, rests = [], [], [], []
    with model.runtime.session(
        "compressor", values, position_ids, cu_prefix, longest, model.adapted.compressor_layers
    ) as session:
        for step in range(longest + 1):
            left = text - covered
            may_end = (last > 0) & (last + left <= config.max_unit_length)
            mass = torch.where(may_end, head.end_mass(session.last, model.codebooks).double(), 0.0)
            masses.append(torch.where(left == 0, 1.0, mass))
            rests.append(left)
            if step == longest or bool((torch.stack(masses).amax(0) >= STOP_THRESHOLD).all()):
                break
            chosen, length, _ = head.select(
                session.last,
                model.codebooks,
                temperature=0.0,
                top_p=1.0,
                seed=0,
                row_ids=row_ids,
                step=step,
                allow_end=False,
            )
            if levels is not None:
                unused = torch.arange(config.num_codebooks, device=device) >= levels[:, None]
                chosen = chosen.masked_fill(unused, -1)
            # Rows that have ended go on with units of one token that nobody keeps.
            last = torch.minimum(length.long(), left.clamp(min=1))
            covered = torch.minimum(covered + last, text)
            codes.append(chosen)
            lengths.append(last)
            embeds = model.z_embeddings(model.dequantize(chosen), last)
            session.step(embeds.to(values.dtype), torch.minimum(covered, text - 1))
    kept = steps_before_stop(torch.stack(masses, dim=1), STOP_THRESHOLD)
    units, rest = torch.stack(lengths, dim=1), torch.stack(rests, dim=1)
    final = kept[:, None] - 1
    units = units.scatter_add(1, final, rest.gather(1, kept[:, None]))
    is_kept = torch.arange(units.shape[1], device=device) < kept[:, None]
    return ZTokens(torch.stack(codes, dim=1)[is_kept], units[is_kept].int(), offsets(kept), cu_documents)


def autoregressive_loss(model: PooledModel, tokens, cu_segments, ratio, z: ZTokens, embeddings) -> torch.Tensor:
    """Cross-entropy of the Z-tokens ``z``, and of end-of-Z, written one by one; nats, the mean over rows.

    Args:
        tokens, cu_segments, ratio: as in `PooledModel.encode`.
        z: the Z-tokens to write; embeddings: theirs, ``[K, D]``. No gradient flows into either.
    """
    head = model.autoregressive
    assert head is not None  # emission "stop" has it
    _, conditioned, _ = model.compressor_inputs(tokens, cu_segments, z.cu_documents, ratio)
    values, position_ids, cu_joined, predict = _rows(
        model, conditioned, cu_segments, embeddings.detach(), z.unit_lengths, z.cu_segments
    )
    hidden = model.runtime.hidden(
        values,
        position_ids,
        cu_joined,
        int(cu_joined.diff().max()),
        adapter="compressor",
        layers=model.adapted.compressor_layers,
    )
    segments = len(cu_segments) - 1
    total = segments + z.ztokens
    is_end = torch.zeros(total, dtype=torch.bool, device=tokens.device)
    # Each segment has its units and then end-of-Z to write.
    is_end[z.cu_segments[1:].long() + torch.arange(segments, device=tokens.device)] = True
    codes = torch.full((total, model.config.num_codebooks), -1, dtype=torch.int32, device=tokens.device)
    codes[~is_end] = z.codes
    lengths = torch.ones(total, dtype=torch.int32, device=tokens.device)
    lengths[~is_end] = z.unit_lengths
    return head.loss(hidden[predict], codes, lengths, is_end, model.codebooks)


def _rows(model: PooledModel, text, cu_segments, embeddings=None, lengths=None, cu_units=None):
    """Packed rows of every segment: its text, the mark that writes the first unit, and the Z-tokens given, if any.

    Args:
        text: input rows of the text, ``[T, D]``; embeddings, lengths, cu_units: of the Z-tokens; ``None`` for none.

    Returns:
        values ``[R, D]``, position ids int64 ``[R]``, int32 offsets ``[S + 1]``, and the rows that write, in order.
    """
    segments, device, head = len(cu_segments) - 1, text.device, model.autoregressive
    assert head is not None
    if embeddings is None:
        embeddings, lengths = text[:0], torch.zeros(0, dtype=torch.int32, device=device)
        cu_units = torch.zeros(segments + 1, dtype=torch.int32, device=device)
    cu_mark = torch.arange(segments + 1, dtype=torch.int32, device=device)
    parts = [cu_segments, cu_mark, cu_units]
    marks = torch.zeros(segments, dtype=torch.int64, device=device)
    joined = ragged_gather([text, head.marks[:1].to(text.dtype), embeddings.to(text.dtype)], [None, marks, None], parts)
    layout = ragged_layout(parts, [len(text), segments, len(embeddings)])
    segment = sequence_of_row(cu_units, len(lengths))
    ends = offsets(lengths).long()[1:] - cu_segments.long()[segment]
    of_units = torch.minimum(ends, cu_segments.diff().long()[segment] - 1)
    position_ids = layout.place([position_in_sequence(cu_segments, len(text)), marks, of_units])
    predict = torch.cat(layout.destinations[1:]).sort().values
    return joined.values, position_ids, layout.cu_seqlens, predict
