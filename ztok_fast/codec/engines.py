"""Which runtime a codec uses: the engine in one of its precisions, or transformers' modules."""

from __future__ import annotations

import warnings

from ztok_fast.codec.errors import CodecError, EngineFallbackWarning
from ztok_fast.codec.runtime import ENGINE_ADAPTERS, EngineRuntime
from ztok_fast.codec.segment_model import SegmentModel
from ztok_fast.codec.zbatch import FLOAT, PRECISIONS, ZBatch
from ztok_fast.engine import Engine, EngineUnsupported

AUTO = "auto"
CHOICES = (AUTO, *PRECISIONS)
DEFAULT_PRECISION = "int8"

STORED_PARAMETERS = 1 << 24
"""A base model of this size takes long enough to prepare that the result is kept in the cache folder."""


class Engines:
    """The engines of one codec. Each is made when it is first needed, and anew when the adapters have changed.

    Args:
        choice: "auto" (int8 where the engine runs the base model, else float; batches decide for themselves), "int8",
            "float32" or "float".
    """

    def __init__(self, model: SegmentModel, choice: str) -> None:
        if choice not in CHOICES:
            raise CodecError(f"engine: expected one of {', '.join(CHOICES)}, got {choice!r}")
        self.choice = choice
        self._model = model
        self._made: dict[str, tuple[int, EngineRuntime]] = {}
        self._told = False

    def use(self, z: ZBatch | None = None) -> str:
        """Let the model run as chosen, or as a batch asks for; returns the precision's name.

        Raises:
            CodecError: the chosen precision cannot run here, or is not the one that exact documents of the batch need.
        """
        exact = z is not None and any(d.corrections is not None and d.corrections.raw is None for d in z.documents)
        wanted = self.choice
        if wanted == AUTO:
            wanted = DEFAULT_PRECISION if z is None else z.precision
        elif z is not None and exact and z.precision != wanted:
            raise CodecError(
                f"engine: expected {z.precision!r}, with which the exact documents were compressed, got {wanted!r}"
            )
        if wanted == FLOAT:
            self._model.engine = None
            return FLOAT
        try:
            self._model.engine = self._get(wanted)
        except EngineUnsupported as error:
            if self.choice != AUTO or exact:
                raise CodecError(str(error)) from error
            self._model.engine = None
            if not self._told and self._model.device.type == "cpu":
                self._told = True
                warnings.warn(EngineFallbackWarning(str(error)), stacklevel=3)
            return FLOAT
        return wanted

    def need(self, precision: str) -> None:
        """Let the model run in the precision that a file's slots were coded with.

        Raises:
            CodecError: another was chosen, or the engine does not run here.
        """
        if self.choice not in (AUTO, precision):
            raise CodecError(
                f"engine: expected {precision!r}, with which the slots of the file were coded, got {self.choice!r}"
            )
        try:
            self._model.engine = self._get(precision)
        except EngineUnsupported as error:
            raise CodecError(str(error)) from error

    def _get(self, precision: str) -> EngineRuntime:
        device = self._model.device
        if device.type != "cpu":  # passes on a GPU have not been run on one yet (docs/engine.md)
            raise EngineUnsupported(f"engine: device of a codec: expected cpu, got {device}")
        # Training and loading change parameters in place, which counts their versions up.
        version = sum(parameter._version for _, parameter in self._model.adapted.adapter_parameters())
        if precision in self._made and self._made[precision][0] == version:
            return self._made[precision][1]
        adapted = self._model.adapted
        large = adapted.model.num_parameters() >= STORED_PARAMETERS
        engine = Engine.from_model(adapted.peft, ENGINE_ADAPTERS, precision, slots=1, capacity=16, cache=large)
        runtime = EngineRuntime(adapted, engine)
        self._made[precision] = (version, runtime)
        return runtime
