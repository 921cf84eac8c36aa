"""Files whose slots are coded with the inferencer as the prior: what a codec adds to `ztok_fast.codec.zfile`."""

from __future__ import annotations

from ztok_fast.codec import slot_prior
from ztok_fast.codec.engines import Engines
from ztok_fast.codec.errors import CodecError, ZBatchError, ZFileError
from ztok_fast.codec.slot_files import SlotReader, Slots, StoredSlots
from ztok_fast.codec.slot_model import SlotModel
from ztok_fast.codec.zbatch import FLOAT, PRECISIONS, ZBatch

MOST_ZTOKENS_OF_A_BYTE = 64
"""What a damaged file can ask for; Z-tokens that take less are coded adaptively."""


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
    data = slot_prior.join(slot_prior.encode(model, z))
    return data if z.ztokens <= MOST_ZTOKENS_OF_A_BYTE * len(data) else None


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
        ztokens = int(stored.cu_segments[-1])
        if ztokens > MOST_ZTOKENS_OF_A_BYTE * len(stored.stream):
            raise ZFileError(f"codes: expected a stream of {ztokens} Z-tokens, got {len(stored.stream)} bytes")
        engines.need(precision)
        streams = slot_prior.split(stored.stream, len(stored.tokens))
        z = slot_prior.decode(model, streams, stored.cu_segments, stored.cu_documents, stored.tokens)
        assert z.slot_offsets is not None
        return z.codes, z.unit_lengths, z.slot_offsets

    return read
