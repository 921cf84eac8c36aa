"""Bits per token and per byte of a base model on files of texts, by source and length of context.

python -m bench.base_bits runs/mini-base/model --files data/dev.jsonl.gz --contexts 512 64
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections import defaultdict
from pathlib import Path

import torch

from ztok_fast.codec.base_model import BaseModel, load_base


def read_texts(path: Path, characters: int, documents: int) -> dict[str, list[str]]:
    """The first ``documents`` texts of every source, each cut to ``characters``."""
    texts: dict[str, list[str]] = defaultdict(list)
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as lines:
        for line in lines:
            entry = json.loads(line)
            if len(texts[entry.get("source", path.name)]) < documents:
                texts[entry.get("source", path.name)].append(entry["text"][:characters])
    return dict(texts)


@torch.inference_mode()
def measure(base: BaseModel, texts: list[str], context: int) -> dict[str, float]:
    """Bits of texts cut into segments of ``context`` tokens, each read on its own after the start token."""
    bits = tokens = size = 0.0
    for text in texts:
        ids = base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        size += len(text.encode())
        tokens += len(ids)
        for start in range(0, len(ids), context):
            own = torch.tensor([[base.bos_token_id, *ids[start : start + context]]])
            logits = base.model(own).logits[0, :-1].float()
            bits += torch.nn.functional.cross_entropy(logits, own[0, 1:], reduction="sum").item() / math.log(2)
    return {"tokens": int(tokens), "bits_per_token": bits / tokens, "bits_per_byte": bits / size}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--files", nargs="+", type=Path, required=True)
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 64])
    parser.add_argument("--characters", type=int, default=4500, help="of each text (default: 4500)")
    parser.add_argument("--documents", type=int, default=24, help="of each source (default: 24)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    base = load_base(options.base)
    if base.bos_token_id is None:
        parser.error(f"{options.base}: expected a tokenizer with a start token, got one without")
    results = []
    print("| source | context | tokens | bits/token | bits/byte |\n| --- | ---: | ---: | ---: | ---: |")
    for path in options.files:
        for source, texts in read_texts(path, options.characters, options.documents).items():
            for context in options.contexts:
                found = measure(base, texts, context)
                results.append({"source": source, "context": context, **found})
                print(
                    f"| {source} | {context} | {found['tokens']:,} | {found['bits_per_token']:.3f} "
                    f"| {found['bits_per_byte']:.3f} |"
                )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
