"""What the training loop does differently for each kind of Z-token."""

from __future__ import annotations

import dataclasses

import torch
from accelerate.utils import broadcast, gather, reduce
from torch import nn

from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.engines import AUTO, Engines
from ztok_fast.codec.pooled_model import PooledModel
from ztok_fast.codec.slot_model import SlotModel
from ztok_fast.train.answer_objective import AnswerObjective
from ztok_fast.train.batches import Batch
from ztok_fast.train.codebooks import CodebookCare, initialise_codebooks, keep_blocks
from ztok_fast.train.evaluate import evaluate
from ztok_fast.train.objective import Objective
from ztok_fast.train.settings import ANSWERING, TrainSettings
from ztok_fast.train.slot_evaluate import evaluate_compressor, evaluate_inferencer, evaluate_slots
from ztok_fast.train.slot_objective import CompressorObjective, InferencerObjective, SlotObjective


class SlotMethod:
    """Z-tokens of slots: the text tells what to write, and no code is learned."""

    def __init__(self, codec: ZTokCodec, settings: TrainSettings) -> None:
        self.codec, self.settings = codec, settings
        model = codec.model
        assert isinstance(model, SlotModel)
        self.objective: nn.Module
        if settings.part in ("inferencer", *ANSWERING):
            # The decompressor stays as it is, so the closed loop, which needs no gradient, runs in the engine.
            Engines(model, AUTO).use()
        if settings.part == "inferencer":
            self.objective = InferencerObjective(model, settings.loss_weights().answer)
        elif settings.part in ANSWERING:
            self.objective = AnswerObjective(model, from_text=settings.part == "answers from text")
        elif settings.part == "compressor":
            self.objective = CompressorObjective(model)
        else:
            self.objective = SlotObjective(model)

    def groups(self) -> list[dict]:
        """The optimiser's groups of parameters, each with its highest learning rate."""
        own, settings = self.codec.model.trainable_parameters(), self.settings
        part = "inferencer" if settings.part in ANSWERING else settings.part
        own = {n: p for n, p in own.items() if _part_of(n) == part}
        adapters = [p for n, p in own.items() if n.startswith("adapters.")]
        modules = [p for n, p in own.items() if not n.startswith("adapters.")]
        return [
            {"params": adapters, "peak": settings.learning_rate},
            {"params": modules, "peak": settings.module_learning_rate or settings.learning_rate},
        ]

    def begin(self, step: int, next_batch) -> None:
        """Called before every step."""

    def loss(self, objective, batch: Batch, step: int, part: int, process: int) -> tuple[dict, int]:
        """The loss terms of one batch, and its Z-tokens."""
        seed = (self.settings.seed * 1_000_003 + step) * 64 + part + 7919 * process
        terms = objective(batch, seed)
        return terms, int(terms.pop("ztokens"))

    def observe(self) -> None:
        """Called after every batch's backward pass."""

    def end(self, step: int, optimizer) -> dict:
        """Called after every step, which is the ``step``-th; what the metrics gain."""
        return {}

    def evaluate(self, dev: list[list[int]], step: int) -> dict:
        measure = {
            "decompressor": evaluate_slots,
            "compressor": evaluate_compressor,
            "inferencer": evaluate_inferencer,
            **dict.fromkeys(ANSWERING, evaluate_inferencer),
        }
        return measure[self.settings.part](self.codec, dev)

    def summary(self, row: dict) -> dict:
        """What the progress bar shows of a step."""
        return {
            name: f"{row[name]:.3f}" for name in ("total", "symbols", "accuracy", "written", "answer") if name in row
        }

    def state(self) -> dict:
        return {}

    def load_state(self, state: dict) -> None:
        pass


def _part_of(name: str) -> str:
    """The part of a codec of slots that a parameter belongs to."""
    for part, module in (("inferencer", "zspace."), ("compressor", "draft.")):
        if f".{part}." in name or name.startswith(module):
            return part
    return "decompressor"


class PooledMethod:
    """Pooled Z-tokens: codebooks start from k-means and are cared for, and the quantiser is blended in."""

    def __init__(self, codec: ZTokCodec, settings: TrainSettings) -> None:
        self.codec, self.settings = codec, settings
        config, model = codec.config, codec.model
        assert isinstance(model, PooledModel)
        self.model = model
        self.objective: nn.Module = Objective(model, settings.loss_weights())
        self.care = CodebookCare(config.num_codebooks, config.codebook_size, settings.kmeans_latents)
        self._observed: tuple = ()

    def groups(self) -> list[dict]:
        own, settings = self.codec.model.trainable_parameters(), self.settings
        return [
            {"params": [p for n, p in own.items() if n.startswith("adapters.")], "peak": settings.learning_rate},
            {
                "params": [p for n, p in own.items() if not n.startswith("adapters.") and n != "codebooks"],
                "peak": settings.module_learning_rate or settings.learning_rate,
            },
            {"params": [own["codebooks"]], "peak": settings.codebook_learning_rate},
        ]

    @torch.no_grad()
    def begin(self, step: int, next_batch) -> None:
        """At the first quantised step, take the codebooks from k-means.

        Compressing alone costs a fraction of a training step, so the store is filled this way.
        """
        settings, model = self.settings, self.model
        if step != settings.continuous_steps:
            return
        stored = len(self.care.latents)
        while stored < settings.kmeans_latents:
            batch = next_batch()
            ratios = self._draw_ratios(batch, step, stored, 0)
            encoded = model.encode(batch.tokens, batch.cu_segments, batch.cu_sections, ratios)
            self.care.observe(encoded.quantized.latents, None)
            stored += encoded.z.ztokens
        latents = gather(self.care.latents.to(model.device))
        initialise_codebooks(model.codebooks, latents, settings.kmeans_iterations, settings.seed)
        broadcast(model.codebooks.data)

    def loss(self, objective, batch: Batch, step: int, part: int, process: int) -> tuple[dict, int]:
        phase = self.settings.phase(step)
        phase = dataclasses.replace(phase, seed=phase.seed * self.settings.accumulation + part)
        terms, encoded = objective(batch, self._draw_ratios(batch, step, part, process), phase)
        self._observed = (encoded.quantized, phase.blend > 0)
        return terms, encoded.z.ztokens

    def observe(self) -> None:
        quantized, quantising = self._observed
        # Usage is counted over all processes, so that they agree on which codes are dead.
        self.care.observe(quantized.latents, reduce(quantized.usage, "sum") if quantising else None)

    def end(self, step: int, optimizer) -> dict:
        settings, phase = self.settings, self.settings.phase(step - 1)
        row: dict = {}
        if phase.blend > 0 and settings.dead_code_every and step % settings.dead_code_every == 0:
            row["codes_replaced"] = self._replace_dead(step, optimizer)
        keep_blocks(self.model.codebooks)
        row.update(
            blend=phase.blend,
            sampling=phase.sampling,
            codes_alive=self.care.alive(),
            perplexity=self.care.perplexity(),
        )
        return row

    def evaluate(self, dev: list[list[int]], step: int) -> dict:
        return evaluate(self.codec, dev, self.codec.config.budgets, quantized=step > self.settings.continuous_steps)

    def summary(self, row: dict) -> dict:
        return {
            "loss": f"{row['reconstruction']:.3f}",
            "acc": f"{row['accuracy']:.3f}",
            "ratio": f"{row['ratio']:.2f}",
            "used": min(row["codes_alive"]),
            "ppl": f"{min(row['perplexity']):.0f}",
        }

    def _draw_ratios(self, batch: Batch, step: int, part: int, process: int) -> torch.Tensor:
        budgets = torch.tensor(self.codec.config.budgets, dtype=torch.float32)
        draw = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + step) * 64 + part + 7919 * process)
        chosen = torch.randint(len(budgets), (len(batch.sections),), generator=draw)
        return budgets[chosen].to(batch.tokens.device)

    def _replace_dead(self, step: int, optimizer) -> int:
        """Replace dead codes, the same ones with the same values in every process; returns how many."""
        codebooks, draw = self.model.codebooks, torch.Generator().manual_seed(self.settings.seed * 31 + step)
        replaced = self.care.replace_dead(codebooks, self.settings.dead_code_threshold, draw)
        broadcast(codebooks.data)
        moments = optimizer.state.get(codebooks, {})
        for level, dead in enumerate(replaced):
            for name in ("exp_avg", "exp_avg_sq"):
                if name in moments:
                    moments[name][level, dead.to(moments[name].device)] = 0.0
        return sum(len(d) for d in replaced)

    def state(self) -> dict:
        return {"care": self.care.state()}

    def load_state(self, state: dict) -> None:
        self.care.load_state(state["care"])


Method = SlotMethod | PooledMethod


def method_of(codec: ZTokCodec, settings: TrainSettings) -> Method:
    return (SlotMethod if codec.config.emission == "slots" else PooledMethod)(codec, settings)
