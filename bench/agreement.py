"""Whether a codec gives the same Z-tokens with the backends that run by default as with the reference: a JSON file.

python -m bench.agreement --codec ztok-mini --files data/dev.jsonl.gz --json docs/results/agreement-ztok-mini.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import ztok_fast
from bench.machine import environment, write_json
from bench.tables import table
from ztok_fast.codec.codec import DEFAULT_CODEC, ZTokCodec
from ztok_fast.codec.passes import compress_windows, window_tokens
from ztok_fast.train.evaluate import dev_documents
from ztok_fast.train.text_data import DataError


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.agreement", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--codec", default=DEFAULT_CODEC, help=f"codec folder or shipped name (default {DEFAULT_CODEC})")
    add("--files", nargs="+", required=True, metavar="FILE", help="JSON lines (.gz) with a text field")
    add("--documents", type=int, default=32, help="documents, spread over the files (default 32)")
    add("--tokens", type=int, default=512, help="tokens of each document (default 512)")
    add("--json", required=True, metavar="FILE", help="results")
    options = parser.parse_args(argv)
    try:
        codec = ZTokCodec.from_pretrained(options.codec)
        limit = min(options.tokens, window_tokens(codec.model))
        documents = dev_documents(options.files, codec.tokenizer, options.documents, limit)
        if not documents:
            raise ValueError(f"files: expected at least one text in {options.files}, got none")
        rows = [compare(codec, documents, ratio) for ratio in codec.config.budgets]
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    named = {"name": Path(options.codec).name, "fingerprint": codec.fingerprint}
    data = {"files": options.files, "documents": len(documents), "tokens": sum(map(len, documents))}
    facts = {"environment": environment("bench.agreement", argv), "codec": named, "data": data}
    write_json(options.json, {**facts, "rows": rows})
    print(table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))
    return int(any(row["codes that differ"] or row["documents of other units"] for row in rows))


def compare(codec: ZTokCodec, documents: list[list[int]], ratio: float) -> dict:
    """Compress the token documents both ways; codes are compared where the units are the same."""
    found = compress_windows(codec.model, documents, ratio)
    with ztok_fast.backend("reference"):
        expected = compress_windows(codec.model, documents, ratio)
    codes = differ = other = 0
    for one, two in zip(found, expected):
        if one.units != two.units or not torch.equal(one.lengths, two.lengths):
            other += 1
            continue
        codes += two.codes.numel()
        differ += int((one.codes != two.codes).sum())
    return {"budget": ratio, "documents of other units": other, "codes": codes, "codes that differ": differ}


if __name__ == "__main__":
    raise SystemExit(main())
