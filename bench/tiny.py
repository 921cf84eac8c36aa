"""A tiny random base model, a codec on it and a little text: what dry runs and tests of the scripts need.

python -m bench.tiny FOLDER STEPS      the settings of a training run, with all that it needs; prints their path
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from ztok_fast.codec.base_model import load_base
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.train.pretrain import PretrainConfig, build_model, train_tokenizer

CODEC = {
    "segment_length": 16, "num_codebooks": 2, "codebook_size": 16, "latent_dim": 8, "max_unit_length": 8,
    "budgets": [2, 4], "lora_rank": 2, "lora_alpha": 2,
}  # fmt: skip
SLOTS = {"emission": "slots", "codebook_size": 300, "max_unit_length": CODEC["segment_length"]}
"""What a codec of slots on the tiny base has in place of these settings."""
TRAINING = {
    "codec": CODEC, "batch_tokens": 256, "section_tokens": 64, "continuous_steps": 1,
    "blend_steps": 1, "surprisal_steps": 1, "sampling_start": 0.5, "sampling_every": 1, "warmup_steps": 1,
    "eval_documents": 2, "eval_tokens": 32, "kmeans_latents": 64, "threads": 1,
}  # fmt: skip
BASE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
    "context": 64,
}  # fmt: skip

_SENTENCES = (
    "The ferry leaves the small harbour at seven and comes back when the light is gone.",
    "A kettle of water boils sooner on a mountain, but the beans in it take longer.",
    "Nobody had written down which of the two keys opened the door to the roof.",
    "In the third year the orchard gave 412 baskets of pears, and in the fourth only 97.",
    "She read the letter twice, folded it in four and put it under the lamp.",
    "Rivers carry sand to the sea; the wind carries some of it back.",
)


def write_texts(path: str | Path, documents: int = 24) -> Path:
    """A JSON-lines file of short documents, each another order of the same sentences."""
    path = Path(path)
    rows = []
    for index in range(documents):
        turn = index % len(_SENTENCES)
        rows.append({"text": " ".join(_SENTENCES[turn:] + _SENTENCES[:turn]), "source": "own"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tiny_base(folder: str | Path, texts: str | Path) -> Path:
    """A random two-layer Llama with a byte-level tokenizer of 300 tokens, in Hugging Face format."""
    folder = Path(folder)
    config = PretrainConfig(out=str(folder), train_files=[str(texts)], **BASE)
    tokenizer = train_tokenizer(config)
    build_model(config, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tiny_codec(folder: str | Path, texts: str | Path, **settings) -> Path:
    """An untrained codec, of `CODEC` and these settings, with its tiny base beside it: it loads, and reconstructs next
    to nothing, or what is written into slots."""
    folder = Path(folder)
    base = load_base(str(write_tiny_base(folder / "base", texts)))
    config = dataclasses.replace(ZTokConfig(**(CODEC | settings)), base_model="tiny", base_fingerprint=base.fingerprint)
    ZTokCodec(base, config).save_pretrained(folder)
    return folder


def write_tiny_run(folder: str | Path, steps: int) -> Path:
    """The settings of a training run of a few steps, in a folder with its base and text."""
    import yaml

    folder = Path(folder)
    folder.mkdir(parents=True)
    texts = write_texts(folder / "texts.jsonl")
    settings = {**TRAINING, "base": str(write_tiny_base(folder / "base", texts)), "out": str(folder / "run")}
    settings |= {"train_files": [str(texts)], "dev_files": [str(texts)], "steps": steps}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "settings.yaml"


if __name__ == "__main__":
    print(write_tiny_run(sys.argv[1], int(sys.argv[2])))
