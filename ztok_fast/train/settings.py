"""Settings of ``ztok train``, read from YAML, and what each step does."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from ztok_fast.codec.config import ZTokConfig
from ztok_fast.train.objective import LossWeights, Phase

ANSWERING = ("answers", "answers from text")
"""Parts that train the inferencer on answers alone, from Z-tokens or, to compare, from the text (`AnswerObjective`)."""

PARTS = ("decompressor", "compressor", "inferencer", *ANSWERING)
"""Of a codec of slots: what the others read depends on the decompressor, so they are trained after it."""

PRECISIONS = ("auto", "bfloat16", "float32")
"""Of the matrix products in training, see `ztok_fast.train.precision`."""


class SettingsError(ValueError):
    """A training setting is missing, unknown, of the wrong type or out of range."""


@dataclass
class TrainSettings:
    """One codec training run.

    Attributes:
        base: base model, as ``load_base`` resolves it; out: folder for checkpoint, metrics and codec.
        part: for the emission "slots", what is trained: "decompressor", and once that is done
            "compressor", "inferencer", or one of `ANSWERING`.
        start: folder of a codec with the same settings whose weights training starts from.
        codec: codec settings (see `ZTokConfig`); loss: the weights (see `LossWeights`).
        train_files, dev_files: JSON lines with a ``text`` field; exclude_sources: prefixes of sources left out.
        steps: optimiser steps; accumulation: batches per step; batch_tokens, section_tokens: text tokens.
        learning_rate: of the adapters; module_learning_rate: of projections, embeddings and heads (0 = the same).
        continuous_steps: steps with continuous latents before k-means; blend_steps: ramp to full quantisation.
        noise: random-token probability in decompressor inputs, falling to ``noise_end`` over the run.
        sampling: scheduled-sampling probability, reached linearly from ``sampling_start`` (share of the run) on;
            it needs a second forward pass, so it is drawn on one step in ``sampling_every``.
        surprisal_steps: steps that use the surprisal's own mass while the halting head learns it.
        density_every: compute the density term on one step in so many; its target costs a pass of the base model.
        precision: of the matrix products: "bfloat16" (autocast; weights and optimiser state stay float32), "float32",
            or "auto", which takes bfloat16 on CUDA and where the CPU multiplies it natively.
        max_minutes: stop with a checkpoint after this wall-clock time; 0 = no limit.
    """

    base: str
    out: str
    train_files: list[str]
    dev_files: list[str] = field(default_factory=list)
    exclude_sources: list[str] = field(default_factory=list)
    codec: dict = field(default_factory=dict)
    loss: dict = field(default_factory=dict)
    steps: int = 2000
    accumulation: int = 1
    batch_tokens: int = 2048
    section_tokens: int = 256
    learning_rate: float = 1e-3
    module_learning_rate: float = 0.0
    codebook_learning_rate: float = 1e-3
    warmup_steps: int = 50
    gradient_clip: float = 1.0
    continuous_steps: int = 400
    blend_steps: int = 100
    kmeans_latents: int = 16384
    kmeans_iterations: int = 8
    dead_code_every: int = 50
    dead_code_threshold: float = 0.1
    level_dropout: float = 0.1
    noise: float = 0.3
    noise_end: float = 0.05
    sampling: float = 0.25
    sampling_start: float = 0.7
    sampling_every: int = 2
    surprisal_steps: int = 200
    density_every: int = 1
    eval_every: int = 200
    eval_documents: int = 16
    eval_tokens: int = 256
    checkpoint_every: int = 100
    max_minutes: float = 0.0
    precision: str = "auto"
    compile: bool = False
    threads: int = 0
    seed: int = 0
    part: str = PARTS[0]
    start: str = ""

    def __post_init__(self) -> None:
        check_types(self, "training setting")
        for name in (
            "steps",
            "accumulation",
            "batch_tokens",
            "section_tokens",
            "sampling_every",
            "density_every",
            "kmeans_latents",
        ):
            if getattr(self, name) < 1:
                raise SettingsError(f"training setting {name}: expected at least 1, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise SettingsError(
                f"training setting precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if self.part not in PARTS:
            raise SettingsError(f"training setting part: expected one of {', '.join(PARTS)}, got {self.part!r}")
        for name in ("noise", "noise_end", "sampling", "sampling_start", "level_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"training setting {name}: expected a share in [0, 1], got {getattr(self, name)}")
        for name, low in (
            ("checkpoint_every", 1),
            ("eval_documents", 1),
            ("eval_tokens", 1),
            ("kmeans_iterations", 1),
            ("continuous_steps", 0),
            ("blend_steps", 0),
            ("warmup_steps", 0),
            ("surprisal_steps", 0),
            ("eval_every", 0),
            ("dead_code_every", 0),
            ("dead_code_threshold", 0),
            ("max_minutes", 0),
            ("threads", 0),
            ("seed", 0),
            ("module_learning_rate", 0),
        ):
            if not low <= getattr(self, name) < math.inf:
                raise SettingsError(f"training setting {name}: expected at least {low}, got {getattr(self, name)}")
        for name in ("learning_rate", "codebook_learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(f"training setting {name}: expected a number above 0, got {getattr(self, name)}")
        if not self.train_files:
            raise SettingsError("training setting train_files: expected at least one file, got none")
        # Slots have no codebooks.
        if self.codec_config().emission != "slots" and self.continuous_steps >= self.steps:
            raise SettingsError(
                f"training setting continuous_steps: expected fewer than steps ({self.steps}), so that the codec "
                f"is trained quantised, got {self.continuous_steps}"
            )
        if self.sampling and self.sampling_start >= 1:
            raise SettingsError(
                "training setting sampling_start: expected less than 1, so that some steps draw from the model's own "
                f"predictions, got {self.sampling_start}; sampling 0 switches it off"
            )
        self.loss_weights()

    def codec_config(self) -> ZTokConfig:
        return ZTokConfig.from_dict({"base_model": self.base, **self.codec})

    def loss_weights(self) -> LossWeights:
        unknown = sorted(set(self.loss) - {f.name for f in fields(LossWeights)})
        if unknown:
            raise SettingsError(f"training setting loss: expected known terms, got {unknown}")
        return LossWeights(**self.loss)

    @classmethod
    def load(cls, path: str | Path) -> TrainSettings:
        return cls(**load_yaml(path, {f.name for f in fields(cls)}, ("base", "out", "train_files")))

    def phase(self, step: int) -> Phase:
        """What step ``step`` (0-based) does."""
        blend = 0.0
        if step >= self.continuous_steps:
            blend = min(1.0, (step - self.continuous_steps + 1) / max(1, self.blend_steps))
        done = step / self.steps
        sampling = 0.0
        if self.sampling and done >= self.sampling_start and step % self.sampling_every == 0:
            sampling = self.sampling * min(1.0, 0.2 + (done - self.sampling_start) / max(1e-9, 1 - self.sampling_start))
        return Phase(
            blend=blend,
            sampling=sampling,
            noise=self.noise + (self.noise_end - self.noise) * done,
            level_dropout=self.level_dropout if blend >= 1 else 0.0,
            predicted_mass=step >= self.surprisal_steps,
            density=step % self.density_every == 0,
            seed=self.seed * 1_000_003 + step,
        )

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then cosine to a twentieth."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


_KINDS = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "list[str]": (list,), "dict": (dict,)}


def check_types(settings, what: str) -> None:
    """Raise `SettingsError` unless every field of a dataclass read from YAML has its declared type."""
    for f in fields(settings):
        value, kinds = getattr(settings, f.name), _KINDS[str(f.type)]
        right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if right and str(f.type) == "list[str]":
            right = all(isinstance(item, str) for item in value)
        if not right:
            # YAML reads 1e-3 as a word and 1.0e-3 as a number.
            hint = " (write it with a decimal point)" if float in kinds and isinstance(value, str) else ""
            raise SettingsError(f"{what} {f.name}: expected {f.type}, got {value!r}{hint}")


def load_yaml(path: str | Path, known: set[str], required: tuple[str, ...]) -> dict:
    """The settings of a YAML file, checked for unknown and missing names."""
    path = Path(path)
    if not path.is_file():
        raise SettingsError(f"settings file {path}: expected an existing YAML file, got none")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {path}: expected YAML, got {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"settings file {path}: expected a mapping, got {type(values).__name__}")
    unknown, missing = sorted(set(values) - known), sorted(set(required) - set(values))
    if unknown:
        raise SettingsError(f"settings file {path}: expected names among {sorted(known)}, got unknown {unknown}")
    if missing:
        raise SettingsError(f"settings file {path}: expected the settings {missing}, got none of them")
    return values
