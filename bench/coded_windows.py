"""Aligned coded units by size of their windows, against the base model's own bits.

python -m bench.coded_windows data/dev.jsonl.gz --bytes 100000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.base_bits import read_texts
from ztok_fast.codec.base_model import load_base
from ztok_fast.codec.coded import DEFAULT_BASE, DEFAULT_CONTEXT, TextCoder
from ztok_fast.codec.coded_units import UnitCoder


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON lines with a text field")
    parser.add_argument("--base", default=str(DEFAULT_BASE))
    parser.add_argument("--bytes", type=int, default=100_000, help="of each source, about (default: 100000)")
    parser.add_argument("--context", type=int, default=DEFAULT_CONTEXT)
    parser.add_argument("--levels", nargs="+", type=int, default=[2, 3, 4, 5])
    parser.add_argument("--codebook-size", type=int, default=2048)
    options = parser.parse_args(arguments)
    coder = TextCoder(load_base(options.base), context=options.context)
    print("| source | bits of a window | H0, bits/token | r | rate, bits/token | rate / H0 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for source, texts in read_texts(options.file, options.bytes, 1 << 20).items():
        sizes = torch.tensor([len(text.encode()) for text in texts]).cumsum(0)
        taken = [text.encode() for text, end in zip(texts, sizes.tolist()) if end <= options.bytes]
        tokens = coder.tokens(taken)
        n = options.context
        own = coder.streams([ids[i : i + n] for ids in tokens for i in range(0, len(ids), n)])[1].sum().item()
        count = sum(map(len, tokens))
        for levels in options.levels:
            units = UnitCoder(coder, levels, options.codebook_size).compress(taken, aligned=True)
            bits = levels * torch.tensor(options.codebook_size).log2().item()
            print(
                f"| {source} | {bits:.0f} | {own / count:.3f} | {units.achieved_ratio:.2f} | {units.rate:.3f} "
                f"| {units.rate * count / own:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
