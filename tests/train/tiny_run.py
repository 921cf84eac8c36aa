"""Small corpora and settings with which a whole training run takes a second."""

import json
import random
from pathlib import Path

from ztok_fast.train.settings import TrainSettings

WORDS = "the small text goes on as texts go and a few merges learn from it until 37 cafés open at noon".split()


def write_corpus(path: Path, rows: int = 16, seed: int = 0, words: int = 20) -> Path:
    """JSON lines of random words; every second row is short and asks a question."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as lines:
        for index in range(rows):
            count = words if index % 2 else 6
            row = {"text": " ".join(draw.choice(WORDS) for _ in range(count)), "source": f"source-{index % 3}"}
            if index % 2 == 0:
                row["qa"] = [{"question": f"which {index}?", "answer": draw.choice(WORDS)}]
            lines.write(json.dumps(row) + "\n")
    return path


CODEC = {
    "segment_length": 16,
    "num_codebooks": 2,
    "codebook_size": 8,
    "latent_dim": 8,
    "max_unit_length": 8,
    "lora_rank": 2,
    "budgets": [2.0, 4.0],
}


def tiny_settings(folder: Path, **changed) -> TrainSettings:
    """Eight steps through every phase: surprisal's mass, continuous, k-means, blend, quantised, sampled."""
    data = folder / "train.jsonl"
    if not data.is_file():
        write_corpus(data)
        write_corpus(folder / "dev.jsonl", rows=4, seed=1)
    values = {
        "base": "tiny",
        "out": str(folder / "run"),
        "train_files": [str(data)],
        "dev_files": [str(folder / "dev.jsonl")],
        "codec": CODEC,
        "steps": 8,
        "batch_tokens": 64,
        "section_tokens": 40,
        "warmup_steps": 2,
        "surprisal_steps": 1,
        "continuous_steps": 2,
        "blend_steps": 2,
        "kmeans_latents": 64,
        "kmeans_iterations": 2,
        "dead_code_every": 2,
        "dead_code_threshold": 0.99,
        "level_dropout": 0.5,
        "sampling_start": 0.5,
        "density_every": 2,
        "eval_every": 0,
        "eval_documents": 2,
        "eval_tokens": 20,
        "checkpoint_every": 4,
    }
    return TrainSettings(**(values | changed))
