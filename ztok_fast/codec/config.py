"""Settings of a codec; they travel with its weights."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

FORMAT_VERSION = 1
Z_POSITIONS = ("start", "center", "end")
EMISSIONS = ("fire", "fixed", "stop", "slots")

_FORMER_NAMES = {"window_segments": "section_segments"}
"""Names in the settings of codecs that are in use, and what they are called now."""


class ConfigError(ValueError):
    """A codec setting is missing, unknown, of the wrong type or out of range."""


@dataclass
class ZTokConfig:
    """What a codec is, apart from its weights.

    Attributes:
        base_model: name or folder of the frozen base model.
        base_fingerprint: SHA-256 of the base model's weights and tokenizer that the codec was trained on.
        segment_length: text tokens compressed side by side in one segment (S).
        context_segments: earlier segments of the section whose Z-tokens the decompressor also sees.
        section_segments: segments of one section. A long text is cut into sections; each has a budget of its own, and
            the context never reaches past it.
        num_codebooks: codes of one Z-token (L): residual levels, or slots.
        codebook_size: entries of one codebook (V); for slots, the base model's vocabulary.
        latent_dim: width of a code vector (d_z).
        max_unit_length: most text tokens that one Z-token may stand for.
        budgets: the ratios r that the codec was trained at.
        emission: ``"slots"`` (a Z-token names L text tokens that the decompressor would not guess, and its unit ends
            when they are full; see `ztok_fast.codec.selection`), or how pooled units are cut: ``"fire"`` (learned
            halting mass, integrate-and-fire, one pass over the text), ``"fixed"`` (units of r tokens, one pass) or
            ``"stop"`` (the compressor writes the Z-tokens of a segment one after another until the mass of end-of-Z
            reaches a threshold; see `ztok_fast.codec.autoregressive`).
        z_position: which text position of its unit gives a Z-token its position id for the decompressor.
        unit_conditioning: add a Z-token's embedding, and the offset in its unit, to the decompressor's input rows
            that write the unit. Unit lengths are stored, so the decompressor knows them; with it the decompressor
            need not learn where to look, without it any engine that serves LoRA can decompress.
        copy_path: also add the unbound Z-token to the decompressor's last hidden states, so that the logits are the
            language model's plus a bias from the Z-token itself; needs ``unit_conditioning``.
        compressor_layers: how many of the base's layers the compressor runs; ``None`` for all.
        lora_rank: rank of the three adapters.
        lora_alpha: LoRA scaling numerator (scaling = alpha / rank).
        format_version: layout of the settings and weights; other versions are refused.

    Raises:
        ConfigError: a setting of the wrong type or out of range.
    """

    base_model: str = ""
    base_fingerprint: str = ""
    segment_length: int = 64
    context_segments: int = 0
    section_segments: int = 32
    num_codebooks: int = 4
    codebook_size: int = 1024
    latent_dim: int = 32
    max_unit_length: int = 16
    budgets: list[float] = field(default_factory=lambda: [2.0, 4.0])
    emission: str = "fire"
    z_position: str = "start"
    unit_conditioning: bool = True
    copy_path: bool = False
    compressor_layers: int | None = None
    lora_rank: int = 32
    lora_alpha: float = 32.0
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name, low in (
            ("segment_length", 1),
            ("context_segments", 0),
            ("section_segments", 1),
            ("num_codebooks", 1),
            ("codebook_size", 2),
            ("latent_dim", 1),
            ("max_unit_length", 1),
            ("lora_rank", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"codec setting {name}: expected an integer of at least {low}, got {value!r}")
        if self.segment_length > 8192:
            # Rounding of the mass adds up over a segment and must stay far below one token's share.
            raise ConfigError(f"codec setting segment_length: expected at most 8192 tokens, got {self.segment_length}")
        if self.codebook_size > 65536:
            raise ConfigError(f"codec setting codebook_size: expected at most 65536, got {self.codebook_size}")
        for name, allowed in (("emission", EMISSIONS), ("z_position", Z_POSITIONS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"codec setting {name}: expected one of {allowed}, got {getattr(self, name)!r}")
        layers = self.compressor_layers
        if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 1):
            raise ConfigError(f"codec setting compressor_layers: expected an integer of at least 1, got {layers!r}")
        if isinstance(self.lora_alpha, bool) or not isinstance(self.lora_alpha, (int, float)):
            raise ConfigError(f"codec setting lora_alpha: expected a number, got {self.lora_alpha!r}")
        for name, kind in (
            ("base_model", str),
            ("base_fingerprint", str),
            ("unit_conditioning", bool),
            ("copy_path", bool),
        ):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"codec setting {name}: expected {kind.__name__}, got {getattr(self, name)!r}")
        if self.copy_path and not self.unit_conditioning:
            raise ConfigError("codec setting copy_path: expected unit_conditioning to be true with it, got false")
        if self.emission == "slots" and self.max_unit_length < self.segment_length:
            raise ConfigError(
                f"codec setting max_unit_length: expected at least segment_length ({self.segment_length}) with "
                f"emission 'slots', whose units end when their slots are full, got {self.max_unit_length}"
            )
        if not isinstance(self.budgets, list) or not self.budgets:
            raise ConfigError(f"codec setting budgets: expected a list of at least one ratio, got {self.budgets!r}")
        for ratio in self.budgets:
            self.check_ratio(ratio)
        if self.format_version != FORMAT_VERSION:
            raise ConfigError(f"codec format version: expected {FORMAT_VERSION}, got {self.format_version!r}")

    def check_ratio(self, ratio: float) -> float:
        """Return ``ratio`` as a float, or raise `ConfigError` when no allocation can reach it."""
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not math.isfinite(ratio):
            raise ConfigError(f"ratio: expected a number, got {ratio!r}")
        if not 1 <= ratio <= self.max_unit_length:
            raise ConfigError(
                f"ratio: expected between 1 and {self.max_unit_length} text tokens per Z-token "
                f"(one Z-token stands for at most {self.max_unit_length} tokens in this codec), got {ratio}"
            )
        return float(ratio)

    @property
    def section_tokens(self) -> int:
        """Most text tokens of one section."""
        return self.section_segments * self.segment_length

    @property
    def bits_per_ztoken(self) -> float:
        """Bits of one Z-token: its L codes and its unit length."""
        return self.num_codebooks * math.log2(self.codebook_size) + math.log2(self.max_unit_length)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> ZTokConfig:
        values = {_FORMER_NAMES.get(name, name): value for name, value in values.items()}
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"codec settings: expected names among {sorted(known)}, got unknown {unknown}")
        return cls(**values)

    def save(self, folder: str | Path) -> None:
        (Path(folder) / "config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> ZTokConfig:
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ConfigError(f"codec folder {folder}: expected a config.json in it, got none")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path}: expected a JSON object, got {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)
