"""Exact learned units: bits per token of whole files beside the base model's own, and CPU time of the remainder.

python -m bench.exact_units data/dev.jsonl.gz --ratio 4 8
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from bench.base_bits import read_texts
from ztok_fast.codec import remainder
from ztok_fast.codec.codec import DEFAULT_CODEC, ZTokCodec
from ztok_fast.codec.layout import offsets, split_segments
from ztok_fast.codec.passes import compress_documents, pack_tokens


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON lines with a text field")
    parser.add_argument("--codec", default=DEFAULT_CODEC)
    parser.add_argument("--ratio", nargs="+", type=float, default=[4.0, 8.0])
    parser.add_argument("--documents", type=int, default=3, help="of each source (default: 3)")
    parser.add_argument("--characters", type=int, default=1500, help="of each document (default: 1500)")
    options = parser.parse_args(arguments)
    codec = ZTokCodec.from_pretrained(options.codec)
    found = read_texts(options.file, options.characters, options.documents)
    texts = [text for own in found.values() for text in own]
    print(
        "| r | own bits | remainder | file of all | / own | files of one | / own | encode tokens/s | decode tokens/s |"
    )
    print("| --- |" + " ---: |" * 8)
    for ratio in options.ratio:
        print("| " + " | ".join(_row(codec, texts, ratio)) + " |", flush=True)


@torch.inference_mode()
def _row(codec: ZTokCodec, texts: list[str], ratio: float) -> list[str]:
    z = codec.compress(texts, ratio, exact=True)
    assert codec.decompress(z) == texts
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        for batch in (z, *z):
            codec.save(batch, path := Path(folder, "x.ztok"))
            sizes.append(path.stat().st_size)
    tokens = codec.tokenize(texts)
    segments, _ = split_segments([len(own) for own in tokens], codec.config.segment_length)
    cu_segments = offsets(torch.tensor(segments))
    own = codec.model.surprisal(pack_tokens(tokens, "cpu"), cu_segments).mean().item()
    limit = codec.config.section_tokens
    sections = [own_tokens[i : i + limit] for own_tokens in tokens for i in range(0, len(own_tokens), limit)]
    units, count = compress_documents(codec.model, sections, ratio), z.tokens
    times = []
    for _ in range(2):  # the first time tables are made
        begin = time.process_time()
        streams = remainder.encode(codec.model, units, sections)
        between = time.process_time()
        remainder.decode(codec.model, units, streams)
        times = [between - begin, time.process_time() - between]
    stored = 8 * sum(map(len, streams)) / count
    rates = [8 * sizes[0] / count, 8 * sum(sizes[1:]) / count]
    numbers = [f"{ratio:g}", f"{own:.2f}", f"{stored:.2f}"]
    numbers += [text for rate in rates for text in (f"{rate:.2f}", f"{rate / own:.2f}")]
    return numbers + [f"{count / seconds:,.0f}" for seconds in times]


if __name__ == "__main__":
    main()
