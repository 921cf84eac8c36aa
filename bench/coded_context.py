"""Size and speed of coded units by context and window: the table of docs/coded-units.md.

python -m bench.coded_context data/dev.jsonl.gz --bytes 300000 --contexts 64 512 4096 --cpu-time
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.base_bits import read_texts
from ztok_fast.codec.base_model import load_base
from ztok_fast.codec.coded import DEFAULT_BASE, DEFAULT_WINDOW, TextCoder


def measure(coder: TextCoder, texts: list[bytes], runs: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Bits per byte, and tokens per second of encoding and of decoding, the best of some runs."""
    tokens = sum(map(len, coder.tokens(texts)))
    encoding = decoding = 0.0
    for _ in range(runs):
        started = clock()
        parts = coder.encode(texts)
        encoded = clock()
        if coder.decode(parts, [len(text) for text in texts]) != texts:
            raise AssertionError("a text did not come back as it was")
        encoding = max(encoding, tokens / (encoded - started))
        decoding = max(decoding, tokens / (clock() - encoded))
    size = sum(len(part.payload) for part in parts)
    return 8 * size / sum(map(len, texts)), encoding, decoding


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON lines with a text field")
    parser.add_argument("--base", default=str(DEFAULT_BASE))
    parser.add_argument("--bytes", type=int, default=300_000, help="of text, about (default: 300000)")
    parser.add_argument("--contexts", nargs="+", type=int, default=[64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--windows", nargs="+", type=int, default=[DEFAULT_WINDOW])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--runs", type=int, default=2, help="the best counts (default: 2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="count the seconds of one thread, on a busy machine")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    texts, size = [], 0
    for text in (text for own in read_texts(options.file, 1 << 20, 1 << 20).values() for text in own):
        if size < options.bytes:
            texts.append(text.encode()[: options.bytes - size].decode(errors="ignore").encode())
            size += len(texts[-1])
    base = load_base(options.base)
    print("| context | window | bits/byte | encoding, tokens/s | decoding, tokens/s |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for context in options.contexts:
        for window in sorted({min(context, window) for window in options.windows}):
            coder = TextCoder(base, context=context, window=window, rows=options.rows)
            bits, encoding, decoding = measure(coder, texts, options.runs, clock)
            print(f"| {context} | {window} | {bits:.4f} | {encoding:,.0f} | {decoding:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
