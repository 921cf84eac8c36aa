"""Streams of slots coded under a codec's model, as files have them: when there are any, and what reads them."""

from __future__ import annotations

from collections.abc import Sequence

from ztok_fast.codec import slot_prior
from ztok_fast.codec.engines import Engines
from ztok_fast.codec.errors import CodecError, ZFileError
from ztok_fast.codec.slot_model import SlotModel
from ztok_fast.codec.zbatch import FLOAT, ZBatch
from ztok_fast.codec.ztokens import ZTokens


class SlotStreams:
    """What a codec's files store of slots under its model."""

    def __init__(self, model, engines: Engines) -> None:
        self._model, self._engines = model, engines

    def write(self, z: ZBatch) -> list[bytes] | None:
        """The streams of a batch's documents; ``None`` without slots, or without the engine that made them."""
        if not isinstance(self._model, SlotModel) or z.precision == FLOAT:
            return None
        try:
            self._engines.need(z.precision)
        except CodecError:
            return None
        return slot_prior.encode(self._model, z)

    def read(self, precision: str, streams: Sequence[bytes], tokens: Sequence[int]) -> ZTokens:
        """The Z-tokens of streams, given the text tokens of each.

        Raises:
            CodecError: the engine of this precision does not run here.
            ZFileError: they hold no such Z-tokens.
        """
        if not isinstance(self._model, SlotModel) or precision == FLOAT:
            raise ZFileError(f"expected slots under a model in int8 or float32, got {precision}: the file is damaged")
        self._engines.need(precision)
        return slot_prior.decode(self._model, streams, tokens)
