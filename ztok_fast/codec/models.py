"""The model that a codec's settings ask for."""

from __future__ import annotations

from transformers import PreTrainedModel

from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.pooled_model import PooledModel
from ztok_fast.codec.segment_model import SegmentModel
from ztok_fast.codec.slot_model import SlotModel


def make_model(base: PreTrainedModel, config: ZTokConfig) -> SegmentModel:
    """A model with fresh weights over a frozen base."""
    return (SlotModel if config.emission == "slots" else PooledModel)(base, config)
