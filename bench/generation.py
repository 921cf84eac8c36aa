"""Continuations in Z-space beside plain sampling of the base model, at equal temperature and about equal length.

python -m bench.generation --codec ztok-mini --files data/dev.jsonl.gz --ratio 5 --json docs/results/generation.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.compression import bits_after, read_texts
from bench.tables import print_rows
from ztok_fast import ZTokCodec
from ztok_fast.codec.base_model import BaseModel, load_base
from ztok_fast.engine import Engine


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of tokens as a share of all, over all texts."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


@torch.inference_mode()
def measure(
    codec: ZTokCodec, bare: BaseModel, prompts: list[list[int]], own: list[list[int]], options: argparse.Namespace
) -> Iterator[dict]:
    """A row with a sample for each way of going on at each temperature, and for the texts' own continuation."""
    z = codec.compress([_text(codec, prompt) for prompt in prompts], options.ratio)
    engine = Engine.from_model(bare.model, None, "float32", slots=len(prompts), capacity=1024)
    found: list[tuple[str, float | None, Sequence[Sequence[int]]]] = []
    for temperature in options.temperatures:
        new = codec.generate(z, options.ztokens, temperature=temperature, seed=1, end_threshold=1.0)
        written = codec.decompress_tokens(new)
        lengths = [max(1, len(ids)) for ids in written]
        plain = engine.generate(prompts, lengths, temperature=temperature, seed=1, end_tokens=())
        found += [("Z-space", temperature, written), ("base model", temperature, plain)]
    for way, temperature, texts in [*found, ("the text itself", None, own)]:
        bits = (bits_after(bare, prompt, list(text)) for prompt, text in zip(prompts, texts) if len(text))
        yield {
            "way": way,
            "temperature": temperature,
            "tokens": sum(map(len, texts)),
            "bits_per_token": sum(bits) / max(1, sum(map(len, texts))),
            "distinct_1": distinct(texts, 1),
            "distinct_2": distinct(texts, 2),
            "sample": _text(codec, texts[0]),
        }


def _text(codec: ZTokCodec, tokens: Sequence[int]) -> str:
    return codec._text_bytes(tokens).decode("utf-8", "replace")


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
    found = read_texts(options.files, 16 * options.prompt, options.documents).values()
    tokens = [list(ids) for texts in found for ids in codec.tokenize(texts) if len(ids) >= 2 * options.prompt]
    if not tokens:
        parser.error(f"--files: expected texts of at least {2 * options.prompt} tokens, got none")
    prompts, own = (
        [ids[: options.prompt] for ids in tokens],
        [ids[options.prompt : 2 * options.prompt] for ids in tokens],
    )
    rows = list(measure(codec, bare, prompts, own, options))
    print_rows({name: cell for name, cell in row.items() if name != "sample"} for row in rows)
    for row in rows:
        print(f"\n{row['way']}, temperature {row['temperature']}: {row['sample']!r}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
