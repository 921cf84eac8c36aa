"""The codec: text in, Z-tokens out, text back."""

from __future__ import annotations

from pathlib import Path

import torch

from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.model import ZTokModel
from ztok_fast.codec.weights import WeightsError, copy_state, load_weights, save_weights


class ZTokCodec:
    def __init__(self, base, config: ZTokConfig) -> None:
        self.base, self.config = base, config
        self.tokenizer = base.tokenizer
        self.model = ZTokModel(base.model, config)

    def load_state(self, state) -> None:
        copy_state(self.model.codec_state(), state)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(folder, self.model.codec_state(), dtype)
        self.config.save(folder)
