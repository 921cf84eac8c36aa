"""Bits and speed on the texts of files, as the tables that the documents quote.

python -m bench.compression bits data/dev.jsonl.gz --contexts 512 64                  a base model's own bits
python -m bench.compression windows data/dev.jsonl.gz --bytes 100000                  aligned coded units by their size
python -m bench.compression contexts data/dev.jsonl.gz --contexts 64 512 4096         coded units by context
python -m bench.compression exact data/dev.jsonl.gz --documents 3 --ratio 4 8         exact learned units
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bench.tables import print_rows
from ztok_fast.codec import remainder
from ztok_fast.codec.base_model import BaseModel, load_base
from ztok_fast.codec.codec import DEFAULT_CODEC, ZTokCodec
from ztok_fast.codec.coded import DEFAULT_BASE, DEFAULT_CONTEXT, DEFAULT_WINDOW, TextCoder
from ztok_fast.codec.coded_units import UnitCoder
from ztok_fast.codec.layout import offsets, split_segments
from ztok_fast.codec.passes import compress_documents, pack_tokens

ALL = 1 << 30


def read_texts(paths: Sequence[Path], characters: int = ALL, documents: int = ALL) -> dict[str, list[str]]:
    """The first ``documents`` texts of every source, each cut to ``characters``."""
    texts: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for line in lines:
                entry = json.loads(line)
                own = texts[entry.get("source", path.name)]
                if len(own) < documents:
                    own.append(entry["text"][:characters])
    return dict(texts)


def bits_after(base: BaseModel, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Bits of tokens under a base model that has read a prompt."""
    logits = base.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(tokens), reduction="sum").item() / math.log(2)


def bits(options: argparse.Namespace) -> Iterator[dict]:
    """Texts cut into segments of some tokens, each read on its own after the start token."""
    base = load_base(options.base)
    if base.bos_token_id is None:
        raise SystemExit(f"{options.base}: expected a tokenizer with a start token, got one without")
    for source, texts in read_texts(options.files, options.characters, options.documents).items():
        tokens = [base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
        count, size = sum(map(len, tokens)), sum(len(text.encode()) for text in texts)
        for context in options.contexts:
            segments = (ids[i : i + context] for ids in tokens for i in range(0, len(ids), context))
            found = sum(bits_after(base, [base.bos_token_id], segment) for segment in segments)
            row = {"source": source, "context": context, "tokens": count}
            yield {**row, "bits_per_token": found / count, "bits_per_byte": found / size}


def windows(options: argparse.Namespace) -> Iterator[dict]:
    """Codes of aligned units against the base model's own bits (H0)."""
    coder = TextCoder(load_base(options.base), context=options.context)
    for source, texts in read_texts(options.files).items():
        taken, size = [], 0
        for text in texts:
            size += len(text.encode())
            if size <= options.bytes:
                taken.append(text.encode())
        if not taken:
            continue
        tokens, n = coder.tokens(taken), options.context
        count = sum(map(len, tokens))
        own = coder.streams([ids[i : i + n] for ids in tokens for i in range(0, len(ids), n)])[1].sum().item() / count
        for levels in options.levels:
            units = UnitCoder(coder, levels, options.codebook_size).compress(taken, aligned=True)
            row = {"source": source, "window_bits": round(levels * math.log2(options.codebook_size)), "H0": own}
            yield {**row, "r": units.achieved_ratio, "bits_per_token": units.rate, "of_H0": units.rate / own}


def contexts(options: argparse.Namespace) -> Iterator[dict]:
    """Size, and the best speed of some runs, of encoding and of decoding."""
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    texts, left = [], options.bytes
    for text in (text for own in read_texts(options.files).values() for text in own):
        texts.append(text.encode()[:left].decode(errors="ignore").encode())
        left -= len(texts[-1])
        if left <= 0:
            break
    base = load_base(options.base)
    for context in options.contexts:
        for window in sorted({min(context, window) for window in options.windows}):
            coder = TextCoder(base, context=context, window=window, rows=options.rows)
            tokens, seconds = sum(map(len, coder.tokens(texts))), []
            for _ in range(options.runs):
                started = clock()
                parts = coder.encode(texts)
                encoded = clock()
                if coder.decode(parts, [len(text) for text in texts]) != texts:
                    raise AssertionError("a text did not come back as it was")
                seconds.append((encoded - started, clock() - encoded))
            size = sum(len(part.payload) for part in parts)
            row = {"context": context, "window": window, "bits_per_byte": 8 * size / sum(map(len, texts))}
            rates = (round(tokens / min(times)) for times in zip(*seconds))
            yield row | dict(zip(("encoding_tokens_per_s", "decoding_tokens_per_s"), rates))


def exact(options: argparse.Namespace) -> Iterator[dict]:
    """Bits per token of whole files, of all texts and of one each, beside the base model's own; and the CPU time of the
    remainder."""
    codec = ZTokCodec.from_pretrained(options.codec)
    texts = [t for own in read_texts(options.files, options.characters, options.documents).values() for t in own]
    tokens = codec.tokenize(texts)
    cu_segments = offsets(torch.tensor(split_segments(list(map(len, tokens)), codec.config.segment_length)[0]))
    own_bits = codec.model.surprisal(pack_tokens(tokens, "cpu"), cu_segments).mean().item()
    limit = codec.config.section_tokens
    sections = [ids[i : i + limit] for ids in tokens for i in range(0, len(ids), limit)]
    for ratio in options.ratio:
        z = codec.compress(texts, ratio, exact=True)
        if codec.decompress(z) != texts:
            raise AssertionError("a text did not come back as it was")
        with tempfile.TemporaryDirectory() as folder:
            sizes = []
            for batch in (z, *z):
                codec.save(batch, path := Path(folder, "x.ztok"))
                sizes.append(path.stat().st_size)
        units = compress_documents(codec.model, sections, ratio)
        for _ in range(2):  # the first time tables are made
            started = time.process_time()
            streams = remainder.encode(codec.model, units, sections)
            encoded = time.process_time()
            remainder.decode(codec.model, units, streams)
            times = encoded - started, time.process_time() - encoded
        per_token = [8 * size / z.tokens for size in (sum(map(len, streams)), sizes[0], sum(sizes[1:]))]
        row = {"r": ratio, "own_bits": own_bits, "remainder": per_token[0]}
        for name, rate in zip(("file_of_all", "files_of_one"), per_token[1:]):
            row |= {name: rate, f"{name}_/_own": rate / own_bits}
        rates = (round(z.tokens / seconds) for seconds in times)
        yield row | dict(zip(("encode_tokens_per_s", "decode_tokens_per_s"), rates))


OPTIONS: dict[Callable[[argparse.Namespace], Iterator[dict]], dict[str, object]] = {
    bits: {"base": str(DEFAULT_BASE), "contexts": [512, 64], "documents": 24, "characters": 4500},
    windows: {"base": str(DEFAULT_BASE), "context": DEFAULT_CONTEXT, "levels": [2, 3, 4, 5], "codebook-size": 2048,
              "bytes": 100_000},
    contexts: {"base": str(DEFAULT_BASE), "contexts": [512, 64], "windows": [DEFAULT_WINDOW], "rows": 128, "runs": 2,
               "threads": 2, "cpu-time": False, "bytes": 100_000},
    exact: {"codec": DEFAULT_CODEC, "ratio": [4.0, 8.0], "documents": 3, "characters": 1500},
}  # fmt: skip
"""The options of each command and their defaults."""
HELP = {
    "documents": "of each source",
    "characters": "of each text",
    "bytes": "of text, about; `windows`: of each source",
    "rows": "segments side by side",
    "runs": "the best counts",
    "cpu-time": "count the seconds of one thread, on a busy machine",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compression", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in OPTIONS:
        own = commands.add_parser(command.__name__, description=command.__doc__)
        own.set_defaults(run=command)
        own.add_argument("files", nargs="+", type=Path, help="JSON lines with a text field")
        own.add_argument("--json", type=Path, help="also write the rows here")
        for option, default in OPTIONS[command].items():
            how: dict = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
            if isinstance(default, list):
                how |= {"type": type(default[0]), "nargs": "+"}
            own.add_argument(f"--{option}", help=HELP.get(option), **how)
    options = parser.parse_args(arguments)
    with torch.no_grad():
        rows = print_rows(options.run(options))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
