"""Files whose slots are coded under the compressor's model: what a codec adds to `ztok_fast.codec.zfile`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ztok_fast.codec import slot_prior
from ztok_fast.codec.engines import Engines
from ztok_fast.codec.errors import CodecError, ZBatchError, ZFileError
from ztok_fast.codec.slot_files import SlotReader, Slots, StoredSlots
from ztok_fast.codec.slot_model import SlotModel
from ztok_fast.codec.varint import read_varint, varint
from ztok_fast.codec.zbatch import FLOAT, PRECISIONS, ZBatch

MOST_TOKENS_OF_A_BYTE = 512
"""Text tokens: what a damaged file can ask for. Z-tokens that take less are coded adaptively."""


def prior_slots(model, engines: Engines, z: ZBatch) -> bytes | None:
    """The slots of a valid batch of this codec as a file stores them with the prior.

    ``None`` where there are no slots, where the engine did not make the batch or does not run here, or where the slots
    take next to nothing anyway.
    """
    if not isinstance(model, SlotModel) or z.precision == FLOAT:
        return None
    try:
        engines.need(z.precision)
    except CodecError:
        return None
    data = join(slot_prior.encode(model, z))
    return data if z.tokens <= MOST_TOKENS_OF_A_BYTE * len(data) else None


def prior_reader(model, engines: Engines, fingerprint: str) -> SlotReader:
    """What reads such slots of a file, where this codec wrote it."""

    def read(stored: StoredSlots) -> Slots:
        stated = stored.metadata
        if not isinstance(model, SlotModel) or stated.get("codec_fingerprint") != fingerprint:
            raise ZBatchError(
                f"codec: expected the one with fingerprint {stated.get('codec_fingerprint', '')[:16]}..., which "
                f"compressed this, got {fingerprint[:16]}..."
            )
        for name in ("num_codebooks", "codebook_size", "max_unit_length"):
            if stated[name] != str(getattr(model.config, name)):
                raise ZBatchError(
                    f"{name}: expected {getattr(model.config, name)}, as the codec has, got {stated[name]}"
                )
        precision = stated.get("precision", FLOAT)
        if precision == FLOAT or precision not in PRECISIONS:
            raise ZFileError(f"precision: expected int8 or float32 beside slots with a prior, got {precision[:20]!r}")
        if sum(stored.tokens) > MOST_TOKENS_OF_A_BYTE * len(stored.stream):
            raise ZFileError(f"codes: expected a stream of {sum(stored.tokens)} tokens, got {len(stored.stream)} bytes")
        engines.need(precision)
        z = slot_prior.decode(model, split(stored.stream, len(stored.tokens)), stored.tokens)
        if not (torch.equal(z.cu_segments, stored.cu_segments) and torch.equal(z.cu_documents, stored.cu_documents)):
            raise ZFileError("codes: expected the segments that the file states, got others: the file is damaged")
        assert z.slot_offsets is not None
        return z.codes, z.unit_lengths, z.slot_offsets

    return read


def join(parts: Sequence[bytes]) -> bytes:
    """Parts one after another, behind the lengths of all but the last as varints."""
    return b"".join([varint(len(part)) for part in parts[:-1]] + list(parts))


def split(data: bytes, count: int) -> list[bytes]:
    """The inverse of `join`.

    Raises:
        ZFileError: the data do not hold ``count`` parts.
    """
    if count == 0 and data:
        raise ZFileError(f"streams: expected none, got {len(data)} bytes: the file is damaged")
    sizes, at, parts = [], 0, []
    for _ in range(count - 1):
        size, at = read_varint(data, at)
        sizes.append(size)
    left = len(data) - at - sum(sizes)
    if left < 0:
        raise ZFileError(f"streams: expected {len(data) - at} bytes, got lengths of more: the file is damaged")
    for size in [*sizes, left][:count]:
        parts.append(data[at : at + size])
        at += size
    return parts
