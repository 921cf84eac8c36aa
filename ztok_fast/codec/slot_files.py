"""How a ``.ztok`` file keeps slots: adaptively (`ztok_fast.codec.slot_coding`), or with a codec's prior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ztok_fast.codec.errors import PriorNeededError, ZFileError
from ztok_fast.codec.slot_coding import decode_slots

ADAPTIVE, PRIOR = "adaptive", "prior"
"""How slots are coded, as the metadata say."""

MOST_ZTOKENS_OF_A_BYTE = 1 << 12
"""A stream that has learned that Z-tokens are all alike holds many in a byte; a damaged one asks for more."""


@dataclass(frozen=True)
class StoredSlots:
    """Slots of a file that are coded with a prior.

    Attributes:
        stream: what is stored; metadata: that of the file.
        cu_segments, cu_documents: int32, of the file's Z-tokens; tokens: text tokens of each document.
    """

    stream: bytes
    metadata: dict[str, str]
    cu_segments: torch.Tensor
    cu_documents: torch.Tensor
    tokens: Sequence[int]


Slots = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes int32 ``[K, L]``, unit lengths int32 ``[K]`` and slot offsets int32 ``[K, L]``."""

SlotReader = Callable[[StoredSlots], Slots]


def read_slots(own: StoredSlots, settings: dict[str, int], read_prior: SlotReader | None) -> Slots:
    """The slots of a file.

    Args:
        settings: num_codebooks, codebook_size and max_unit_length, as the file states them.
        read_prior: reads slots that are coded with a prior.

    Raises:
        PriorNeededError: ``read_prior`` is needed and not given.
        ZFileError: the stream does not hold such slots.
    """
    ztokens, coding = int(own.cu_segments[-1]), own.metadata.get("slots")
    if coding == PRIOR:
        if read_prior is None:
            raise PriorNeededError(
                "its slots are coded under the codec's compressor: read it with codec.load(path), codec "
                "being the ZTokCodec that compressed it"
            )
        return read_prior(own)
    if coding != ADAPTIVE:
        raise ZFileError(f"metadata slots: expected {ADAPTIVE} or {PRIOR}, got {str(coding)[:40]!r}")
    # A Z-token takes some bits of the stream, but no more than a few bytes may ask for much memory.
    if ztokens > MOST_ZTOKENS_OF_A_BYTE * len(own.stream):
        raise ZFileError(f"codes: expected a stream of {ztokens} Z-tokens, got {len(own.stream)} bytes")
    return decode_slots(
        own.stream, ztokens, settings["num_codebooks"], settings["codebook_size"], settings["max_unit_length"]
    )
