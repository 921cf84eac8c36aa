"""Pretraining of a small Llama-shaped language model from scratch: the base of ``ztok-mini``.

The run is resumable at any step: the token stream is stored once, the order of the blocks follows
from the seed, and a checkpoint holds the model, the optimiser and the step.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ztok_fast.train.metrics import append_row, drop_rows_after
from ztok_fast.train.precision import autocast_dtype
from ztok_fast.train.settings import PRECISIONS, SettingsError, check_types, load_yaml
from ztok_fast.train.text_data import iter_texts

END_OF_TEXT = "<|endoftext|>"

MODEL_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "context",
)
"""Settings that a checkpoint's model and the order of its blocks depend on."""


@dataclass
class PretrainConfig:
    """Settings of ``ztok pretrain`` (read from YAML).

    Lengths are in tokens, ``tokenizer_chars`` in characters. Learning rates rise linearly for ``warmup_steps``, stay,
    and fall linearly to zero over the last ``decay_steps``: before the decay begins ``steps`` can be changed and the
    run resumed. Matrices inside the layers are trained by Muon (Jordan et al., 2024) at ``learning_rate``, everything
    else by AdamW at ``adamw_learning_rate``. ``precision`` is that of the matrix products: "bfloat16" (autocast;
    weights and optimiser state stay float32), "float32", or "auto", which takes bfloat16 where the CPU multiplies it
    natively. ``compile`` runs the model through `torch.compile`.
    """

    out: str
    train_files: list[str]
    dev_files: list[str] = field(default_factory=list)
    exclude_sources: list[str] = field(default_factory=list)
    vocab_size: int = 2048
    tokenizer_chars: int = 20_000_000
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    context: int = 256
    batch_size: int = 16
    steps: int = 2000
    learning_rate: float = 2e-2
    adamw_learning_rate: float = 3e-3
    warmup_steps: int = 100
    decay_steps: int = 400
    weight_decay: float = 0.05
    precision: str = "auto"
    compile: bool = False
    checkpoint_every: int = 200
    eval_every: int = 200
    seed: int = 0
    threads: int = 0

    @classmethod
    def load(cls, path: str | Path) -> PretrainConfig:
        """Read settings from YAML.

        Raises:
            ValueError: the file is missing or not YAML, or a setting is unknown, missing or not valid.
        """
        config = cls(**load_yaml(path, {f.name for f in fields(cls)}, ("out", "train_files")))
        config.validate()
        return config

    def validate(self) -> None:
        """Raise `SettingsError` (a ``ValueError``) that names the first setting that is not right."""
        check_types(self, "pretrain setting")
        for name in (
            "vocab_size",
            "tokenizer_chars",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "context",
            "batch_size",
            "steps",
            "checkpoint_every",
            "eval_every",
        ):
            if getattr(self, name) < 1:
                raise SettingsError(f"pretrain setting {name}: expected a positive number, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise SettingsError(
                "pretrain settings: expected hidden_size divisible by num_heads and num_heads by num_kv_heads, "
                f"got {self.hidden_size}, {self.num_heads}, {self.num_kv_heads}"
            )
        if self.precision not in PRECISIONS:
            raise SettingsError(
                f"pretrain setting precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if not self.train_files:
            raise SettingsError("pretrain setting train_files: expected at least one file, got none")


def train_tokenizer(config: PretrainConfig) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the first ``tokenizer_chars`` characters of the corpus."""

    def sample():
        seen = 0
        for text in iter_texts(config.train_files, config.exclude_sources):
            yield text
            seen += len(text)
            if seen >= config.tokenizer_chars:
                return

    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(
        sample(), vocab_size=config.vocab_size, min_frequency=2, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with tied embeddings and the sizes of ``config``, freshly initialised from its seed."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=4 * config.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def token_stream(paths, exclude, tokenizer, cache: Path) -> np.ndarray:
    """All texts as one ``uint16``/``uint32`` token array, an end-of-text token after each; kept in ``cache``.

    A kept array is used whatever the files hold by then, so that a run goes on with the text it began with.
    """
    if cache.is_file():
        return np.load(cache, mmap_mode="r")
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    pieces: list[np.ndarray] = []
    batch: list[str] = []

    def flush():
        if not batch:
            return
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            pieces.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=dtype))
        batch.clear()

    for text in iter_texts(paths, exclude):
        batch.append(text)
        if len(batch) == 256:
            flush()
    flush()
    if not pieces:
        raise ValueError(f"text files {list(paths)}: expected at least one text outside the excluded sources, got none")
    stream = np.concatenate(pieces)
    temporary = cache.with_suffix(".tmp.npy")
    np.save(temporary, stream)
    os.replace(temporary, cache)
    return np.load(cache, mmap_mode="r")


def blocks_of_step(stream: np.ndarray, step: int, config: PretrainConfig) -> torch.Tensor:
    """The token blocks ``[batch_size, context + 1]`` of one step; a function of seed and step alone."""
    count = (len(stream) - 1) // config.context
    if count < 1:
        raise ValueError(f"training text: expected more than {config.context} tokens, got {len(stream)}")
    rows = []
    for index in range(step * config.batch_size, (step + 1) * config.batch_size):
        epoch, offset = divmod(index, count)
        order = _epoch_order(config.seed, epoch, count)
        start = int(order[offset]) * config.context
        rows.append(np.asarray(stream[start : start + config.context + 1], dtype=np.int64))
    return torch.from_numpy(np.stack(rows))


_ORDERS: dict[tuple[int, int, int], np.ndarray] = {}


def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    key = (seed, epoch, count)
    if key not in _ORDERS:
        _ORDERS.clear()
        _ORDERS[key] = np.random.default_rng([seed, epoch]).permutation(count)
    return _ORDERS[key]


def schedule(step: int, config: PretrainConfig) -> float:
    """The share of the peak learning rates that step ``step`` (from 0) is taken with."""
    rising = (step + 1) / max(1, config.warmup_steps)
    falling = (config.steps - step) / max(1, config.decay_steps)
    return min(1.0, rising, falling)


def next_token_loss(model: LlamaForCausalLM, blocks: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Mean cross-entropy in nats of ``blocks[:, 1:]`` given what precedes; matrix products in ``dtype``, if given."""
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logits = model(input_ids=blocks[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), blocks[:, 1:].flatten())


def build_optimizers(model: LlamaForCausalLM, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    inside = [p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n]
    chosen = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(inside, lr=config.learning_rate, weight_decay=config.weight_decay, momentum=0.95)
    adamw = torch.optim.AdamW(rest, lr=config.adamw_learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


@torch.no_grad()
def dev_bits_per_token(model, stream: np.ndarray, config: PretrainConfig, blocks: int = 64) -> float:
    """Bits per token on the first ``blocks`` blocks of the dev text."""
    count = min(blocks, (len(stream) - 1) // config.context)
    if count < 1:
        raise ValueError(f"dev text: expected more than {config.context} tokens, got {len(stream)}")
    rows = [np.asarray(stream[i * config.context : (i + 1) * config.context + 1], np.int64) for i in range(count)]
    losses = [
        next_token_loss(model, torch.from_numpy(np.stack(rows[i : i + config.batch_size]))).item()
        * len(rows[i : i + config.batch_size])
        for i in range(0, count, config.batch_size)
    ]
    return sum(losses) / count / math.log(2)


def pretrain(config: PretrainConfig) -> Path:
    """Train, or go on training, the model of ``config``; returns the folder of the finished model.

    ``config.out`` receives ``tokens-*.npy``, ``checkpoint.pt`` (replaced atomically),
    ``metrics.jsonl`` and, when the last step is done, ``model/`` in Hugging Face format.

    Raises:
        ValueError: a setting or data file is wrong, or the checkpoint is of a model of other sizes.
    """
    config.validate()
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_dir = out / "tokenizer"
    if tokenizer_dir.is_dir():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    else:
        tokenizer = train_tokenizer(config)
        tokenizer.save_pretrained(tokenizer_dir)
    train = token_stream(config.train_files, config.exclude_sources, tokenizer, out / "tokens-train.npy")
    dev = None
    if config.dev_files:
        dev = token_stream(config.dev_files, config.exclude_sources, tokenizer, out / "tokens-dev.npy")
    model = build_model(config, tokenizer)
    optimizers = build_optimizers(model, config)
    dtype = autocast_dtype(config.precision)
    loss_of = torch.compile(next_token_loss) if config.compile else next_token_loss
    first = _resume(out / "checkpoint.pt", model, optimizers, config)
    metrics = out / "metrics.jsonl"
    drop_rows_after(metrics, first)
    started = time.monotonic()
    progress = tqdm(range(first, config.steps), initial=first, total=config.steps, desc="pretrain", mininterval=5)
    for step in progress:
        share = schedule(step, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak"]
        loss = loss_of(model, blocks_of_step(train, step, config), dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        row = {"step": step + 1, "loss": loss.item(), "schedule": share}
        row["tokens_per_second"] = (
            (step + 1 - first) * config.batch_size * config.context / (time.monotonic() - started)
        )
        done = step + 1 == config.steps
        if dev is not None and (done or (step + 1) % config.eval_every == 0):
            row["dev_bits_per_token"] = dev_bits_per_token(model, dev, config)
        append_row(metrics, row)
        progress.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        if done or (step + 1) % config.checkpoint_every == 0:
            _save(out / "checkpoint.pt", model, optimizers, step + 1, config)
    folder = out / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _save(path: Path, model, optimizers, step: int, config: PretrainConfig) -> None:
    temporary = path.with_suffix(".tmp")
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "config": asdict(config),
    }
    torch.save(state, temporary)
    os.replace(temporary, path)


def _resume(path: Path, model, optimizers, config: PretrainConfig) -> int:
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    changed = [name for name in MODEL_SETTINGS if state["config"][name] != getattr(config, name)]
    if changed:
        raise SettingsError(
            f"{path}: expected a checkpoint of the same model, got another {changed}; choose another `out`"
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]
