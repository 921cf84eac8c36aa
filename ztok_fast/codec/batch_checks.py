"""Whether a batch fits the codec that is to decompress it.

A file states its own sizes, and its checksum covers what it states. A wrong statement with a right checksum
would end in an index error or, worse, in another text, so the codec compares before it uses anything.
"""

from __future__ import annotations

from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.errors import ZBatchError
from ztok_fast.codec.zbatch import ZBatch


def check_fits(z: ZBatch, config: ZTokConfig, vocabulary: int | None = None) -> None:
    """Raise `ZBatchError` unless a valid batch has the sizes and the segments of this codec.

    Args:
        vocabulary: tokens that the base model has an embedding for, where corrections are to be looked at.
    """
    for name in ("num_codebooks", "codebook_size", "max_unit_length"):
        if getattr(z, name) != getattr(config, name):
            raise ZBatchError(f"{name}: expected {getattr(config, name)}, as the codec has, got {getattr(z, name)}")
    if (z.slot_offsets is not None) != (config.emission == "slots"):
        raise ZBatchError("Z-tokens: expected slots from a codec of slots and from no other")
    _check_segments(z, config.segment_length)
    for index, document in enumerate(z.documents):
        corrections = document.corrections
        if (
            vocabulary
            and corrections is not None
            and len(corrections.tokens)
            and int(corrections.tokens.max()) >= vocabulary
        ):
            raise ZBatchError(
                f"document {index}: corrections.tokens: expected token ids below {vocabulary}, the size of the "
                f"base model's vocabulary, got {int(corrections.tokens.max())}"
            )


def _check_segments(z: ZBatch, segment_length: int) -> None:
    """Segments decide what the decompressor sees of a document, so they must lie where compression cut."""
    tokens = z.cu_text.diff().tolist()
    bounds = z.cu_documents.tolist()
    for index, document in enumerate(z.documents):
        own = tokens[bounds[index] : bounds[index + 1]]
        where = f"document {index}: segments: expected"
        if max(own, default=1) > segment_length:
            raise ZBatchError(f"{where} at most {segment_length} text tokens in each, got {max(own)}")
        if min(own, default=1) < 1:
            raise ZBatchError(f"{where} at least 1 text token in each, got {min(own)}")
        # Generated Z-tokens (no original) may leave a segment partly filled: the next unit did not fit.
        if document.byte_length is not None and any(length != segment_length for length in own[:-1]):
            raise ZBatchError(f"{where} {segment_length} text tokens in each but the last, got {own[:-1]}")
