"""The training loop of a codec: resumable, checkpointed, on one process or several (Accelerate)."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather
from tqdm import tqdm

from ztok_fast.codec.base_model import load_base
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.weights import WeightsError, load_weights
from ztok_fast.train.batches import SectionStream
from ztok_fast.train.evaluate import dev_documents
from ztok_fast.train.methods import method_of
from ztok_fast.train.metrics import append_row, drop_rows_after
from ztok_fast.train.precision import autocast_dtype
from ztok_fast.train.settings import SettingsError, TrainSettings

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"


class Trainer:
    """Trains the codec of ``settings``; `run` begins, or goes on from the checkpoint in ``settings.out``.

    Args:
        settings: the run; base: a loaded `BaseModel` to use instead of
            resolving ``settings.base``.

    Raises:
        SettingsError: the checkpoint in ``settings.out`` is of other settings, or a part of it is missing.
        ValueError: a setting or a data file is wrong.
    """

    def __init__(self, settings: TrainSettings, base=None) -> None:
        self.settings = settings
        if settings.threads:
            torch.set_num_threads(settings.threads)
        # Without `cpu` several processes on the CPU would not know of each other, and all write to one folder.
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            # Accelerate would keep the first trainer's precision for the whole process.
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.dtype = autocast_dtype(settings.precision, self.accelerator.device.type)
        """Of the matrix products; None: that of the weights."""
        self.out = Path(settings.out)
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.seed)
        base = base or load_base(settings.base)
        config = dataclasses.replace(settings.codec_config(), base_model=base.name, base_fingerprint=base.fingerprint)
        self.codec = ZTokCodec(base, config, engine="float")
        self.model = self.codec.model
        if settings.start:
            self._start_from(Path(settings.start))
        self.method = method_of(self.codec, settings)
        self.stream = SectionStream(
            settings.train_files,
            base.tokenizer,
            segment_length=config.segment_length,
            section_tokens=settings.section_tokens,
            batch_tokens=settings.batch_tokens,
            seed=settings.seed,
            exclude_sources=settings.exclude_sources,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        self.dev = dev_documents(
            settings.dev_files, base.tokenizer, settings.eval_documents, settings.eval_tokens, settings.exclude_sources
        )
        groups = self.method.groups()
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.step = 0
        self._restore(optimizer)
        self.objective, self.optimizer = self.accelerator.prepare(self.method.objective, optimizer)
        if settings.compile:
            self.model.adapted.compile(dynamic=True)

    def run(self) -> Path:
        """Train to the last step; returns the folder of the saved codec.

        Ctrl-C, or ``max_minutes``, stops after the step and a checkpoint; the same command goes on from there. An
        error saves nothing: the step it came from is half done, and the last checkpoint stays as it is.

        Raises:
            FloatingPointError: the loss or its gradient is not finite.
            KeyboardInterrupt: Ctrl-C, once the checkpoint is written.
        """
        settings, started = self.settings, time.monotonic()
        progress = tqdm(
            initial=self.step,
            total=settings.steps,
            desc="train",
            mininterval=5,
            disable=not self.accelerator.is_local_main_process,
        )
        saved_at = self.step
        try:
            with _interrupts_between_steps() as interrupted:
                while self.step < settings.steps:
                    row = self.train_step()
                    if self.step == settings.steps or (settings.eval_every and self.step % settings.eval_every == 0):
                        row["eval"] = self.evaluate()
                    self._log(row)
                    progress.set_postfix(**self.method.summary(row), refresh=False)
                    progress.update()
                    if self.step % settings.checkpoint_every == 0:
                        self._save()
                        saved_at = self.step
                    out_of_time = 0 < settings.max_minutes * 60 < time.monotonic() - started
                    if self._anywhere(out_of_time or bool(interrupted)):
                        break
                if saved_at != self.step:
                    self._save()
        finally:
            progress.close()
        if interrupted and self.step < settings.steps:
            raise KeyboardInterrupt
        folder = self.out / "codec"
        if self.accelerator.is_main_process:
            self.codec.save_pretrained(folder, dtype=torch.bfloat16)
        return folder

    def train_step(self) -> dict:
        """One optimiser step over ``accumulation`` batches; returns its metrics."""
        settings, began = self.settings, time.monotonic()
        device = self.accelerator.device
        self.method.begin(self.step, lambda: self.stream.next_batch().to(device))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * settings.learning_rate_factor(self.step)
        row: dict = {"step": self.step + 1}
        tokens = units = 0
        for part in range(settings.accumulation):
            batch = self.stream.next_batch().to(device)
            # Gradients of several processes are averaged once, with the last batch of the step.
            last = part == settings.accumulation - 1
            with _sync_when(last, self.accelerator, self.objective):
                with self._autocast():
                    terms, count = self.method.loss(
                        self.objective, batch, self.step, part, self.accelerator.process_index
                    )
                self.accelerator.backward(terms["total"] / settings.accumulation)
            self.method.observe()
            tokens, units = tokens + len(batch.tokens), units + count
            for name, value in terms.items():
                row[name] = row.get(name, 0.0) + value.item() / settings.accumulation
        # No process may go on alone, so all of them look at whether any has a loss that is not finite.
        if self._anywhere(not math.isfinite(row["total"])):
            self._diverged("loss", row["total"])
        norm = self.accelerator.clip_grad_norm_(self.model.trainable_parameters().values(), settings.gradient_clip)
        if not math.isfinite(norm):
            self._diverged("norm of its gradient", float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        row.update(self.method.end(self.step, self.optimizer))
        row.update(
            gradient_norm=float(norm),
            ratio=tokens / max(1, units),
            tokens_per_second=tokens / (time.monotonic() - began),
        )
        return row

    def _autocast(self) -> torch.autocast:
        device = self.accelerator.device.type
        return torch.autocast(device, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def evaluate(self) -> dict:
        """What the method measures on the dev documents; empty without dev files."""
        if not self.dev or not self.accelerator.is_main_process:
            return {}
        return self.method.evaluate(self.dev, self.step)

    def _diverged(self, what: str, value: float) -> None:
        kept = self.out / CHECKPOINT
        raise FloatingPointError(
            f"step {self.step + 1}: the {what} is {value}; lower learning_rate (now {self.settings.learning_rate}). "
            + (f"{kept} is from before." if kept.is_file() else "There is no checkpoint yet.")
        )

    def _anywhere(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process; all of them get the same answer."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(gather(torch.tensor([flag], device=self.accelerator.device)).any())

    def _start_from(self, folder: Path) -> None:
        try:
            self.codec.load_state(load_weights(folder))
        except WeightsError as error:
            raise SettingsError(f"training setting start: {folder}: {error}") from error

    def _log(self, row: dict) -> None:
        if self.accelerator.is_main_process:
            append_row(self.out / METRICS, row)

    def _save(self) -> None:
        streams = self.stream.state()
        path = self.out / CHECKPOINT
        if not self.accelerator.is_main_process:
            path = self.out / f"stream-{self.accelerator.process_index}.pt"
            state = {"step": self.step, "stream": streams, **self.method.state()}
        else:
            state = {
                "step": self.step,
                "stream": streams,
                **self.method.state(),
                "codec": {n: p.detach() for n, p in self.model.codec_state().items()},
                "optimizer": self.optimizer.state_dict(),
                "config": self.model.config.to_dict(),
            }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def _restore(self, optimizer) -> None:
        path = self.out / CHECKPOINT
        if not path.is_file():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, own = ZTokConfig.from_dict(state["config"]).to_dict(), self.model.config.to_dict()
        if saved != own:
            changed = sorted(k for k in own if saved[k] != own[k])
            raise SettingsError(
                f"{path}: expected a checkpoint of the same codec settings and base model, got other {changed}; "
                "choose another `out` folder or remove the checkpoint"
            )
        self.codec.load_state(state["codec"])
        optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if self.accelerator.process_index:
            own_part = self.out / f"stream-{self.accelerator.process_index}.pt"
            if own_part.is_file():
                state = torch.load(own_part, map_location="cpu", weights_only=True)
            if not own_part.is_file() or state["step"] != self.step:
                raise SettingsError(
                    f"{own_part}: expected the stream of process {self.accelerator.process_index} at step {self.step}, "
                    f"got {'none' if not own_part.is_file() else state['step']}; go on with as many processes as before"
                )
        self.stream.load_state(state["stream"])
        self.method.load_state(state)
        if self.accelerator.is_main_process:
            drop_rows_after(self.out / METRICS, self.step)


@contextmanager
def _interrupts_between_steps() -> Iterator[list[int]]:
    """Yield a list that Ctrl-C makes non-empty, so that a step is never left half done; a second one raises at once.

    A checkpoint from the middle of a step would have drawn its batch and not learned from it.
    """
    interrupted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals reach the main thread alone
        return

    def note(number, frame) -> None:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _sync_when(last: bool, accelerator: Accelerator, module):
    return nullcontext() if last else accelerator.no_sync(module)
