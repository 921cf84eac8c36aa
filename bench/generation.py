"""Continuations in Z-space beside plain sampling of the base model, at equal temperature and about equal length.

python -m bench.generation --codec ztok-mini --files data/dev.jsonl.gz --ratio 5 --json docs/results/generation.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.base_bits import read_texts
from ztok_fast import ZTokCodec
from ztok_fast.codec.base_model import BaseModel, load_base
from ztok_fast.engine import Engine


@torch.inference_mode()
def bits_after(base: BaseModel, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> float:
    """Mean bits per token of texts under the bare base model, each after its prompt."""
    bits = count = 0.0
    for prompt, text in zip(prompts, texts):
        if not len(text):
            continue
        logits = base.model(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1].float()
        bits += torch.nn.functional.cross_entropy(logits, torch.tensor(list(text)), reduction="sum").item() / math.log(
            2
        )
        count += len(text)
    return bits / max(1.0, count)


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of tokens as a share of all, over all texts."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def measure(codec: ZTokCodec, bare: BaseModel, prompts: list[list[int]], ratio: float, ztokens: int, temperatures):
    """A row for each way of going on and each temperature, and one for the texts' own continuation if given."""
    z = codec.compress([codec._text_bytes(p).decode("utf-8", "replace") for p in prompts], ratio)
    engine = Engine.from_model(bare.model, None, "float32", slots=len(prompts), capacity=1024)
    rows = []
    for temperature in temperatures:
        new = codec.generate(z, ztokens, temperature=temperature, seed=1, end_threshold=1.0)
        written = codec.decompress_tokens(new)
        lengths = [max(1, len(own)) for own in written]
        plain = engine.generate(prompts, lengths, temperature=temperature, seed=1, end_tokens=())
        for name, texts in (("Z-space", written), ("base model", plain)):
            rows.append(
                {
                    "way": name,
                    "temperature": temperature,
                    "tokens": sum(map(len, texts)),
                    "bits_per_token": bits_after(bare, prompts, texts),
                    "distinct_1": distinct(texts, 1),
                    "distinct_2": distinct(texts, 2),
                    "sample": codec._text_bytes(texts[0]).decode("utf-8", "replace"),
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codec", default="ztok-mini")
    parser.add_argument("--files", nargs="+", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=5.0)
    parser.add_argument("--documents", type=int, default=8, help="of each source (default: 8)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt (default: 256)")
    parser.add_argument("--ztokens", type=int, default=24, help="new Z-tokens (default: 24)")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.7, 1.0])
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    codec = ZTokCodec.from_pretrained(options.codec)
    bare = load_base(codec.config.base_model, expected_fingerprint=codec.config.base_fingerprint or None)
    prompts, own = [], []
    for path in options.files:
        for texts in read_texts(path, 16 * options.prompt, options.documents).values():
            for tokens in map(list, codec.tokenize(texts)):
                if len(tokens) >= 2 * options.prompt:
                    prompts.append(tokens[: options.prompt])
                    own.append(tokens[options.prompt : 2 * options.prompt])
    if not prompts:
        parser.error(f"--files: expected texts of at least {2 * options.prompt} tokens, got none")
    rows = measure(codec, bare, prompts, options.ratio, options.ztokens, options.temperatures)
    rows.append(
        {
            "way": "the text itself",
            "temperature": None,
            "tokens": sum(map(len, own)),
            "bits_per_token": bits_after(bare, prompts, own),
            "distinct_1": distinct(own, 1),
            "distinct_2": distinct(own, 2),
        }
    )
    print("| way | temperature | tokens | bits/token under the base | distinct-1 | distinct-2 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        temperature = "–" if row["temperature"] is None else f"{row['temperature']:g}"
        print(
            f"| {row['way']} | {temperature} | {row['tokens']:,} | {row['bits_per_token']:.2f} "
            f"| {row['distinct_1']:.3f} | {row['distinct_2']:.3f} |"
        )
    for row in rows:
        if "sample" in row:
            print(f"\n{row['way']}, temperature {row['temperature']:g}: {row['sample']!r}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
