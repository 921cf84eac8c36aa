"""Shows that exact mode gives back every byte: compress, save, load, decompress, compare.

It takes the first characters of the first texts of each JSON-lines file, and always the strings of
:mod:`bench.nasty_strings`. Exit code 0 only when every text of every family came back.

    python -m bench.exact_roundtrip --codec ztok-mini --files data/tasks/*.jsonl.gz
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from bench.environment import environment
from bench.nasty_strings import LONG, nasty_bytes, nasty_texts
from bench.tables import number, table
from ztok_fast.codec.codec import DEFAULT_CODEC, ZTokCodec
from ztok_fast.codec.zbatch import ZBatch
from ztok_fast.train.text_data import DataError, iter_texts


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.exact_roundtrip", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--codec", default=DEFAULT_CODEC, help=f"codec folder or shipped name (default {DEFAULT_CODEC})"
    )
    parser.add_argument("--ratio", type=float, default=4.0, help="text tokens per Z-token to aim at (default 4)")
    parser.add_argument("--files", nargs="*", default=[], metavar="FILE", help="JSON lines (.gz) with a text field")
    parser.add_argument("--limit", type=int, default=50, help="texts of each file (default 50)")
    parser.add_argument("--characters", type=int, default=2000, help="characters of each text (default 2000)")
    parser.add_argument(
        "--long", type=int, default=LONG, help=f"characters of the longest nasty string (default {LONG})"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON")
    options = parser.parse_args(argv)
    for name in ("limit", "characters", "long"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    try:
        families = {
            "nasty strings": nasty_texts(options.long),
            "nasty bytes": nasty_bytes(),
            **{family_name(f): read_family(f, options.limit, options.characters) for f in options.files},
        }
        codec = ZTokCodec.from_pretrained(options.codec)
        codec.config.check_ratio(options.ratio)
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = []
    for name, documents in families.items():
        print(f"{name}: {len(documents)} texts ...", file=sys.stderr, flush=True)
        results.append(check_family(codec, name, documents, options.ratio))
    print(report(results))
    if options.json:
        facts = {
            "environment": environment("bench.exact_roundtrip", argv),
            "codec": codec.fingerprint,
            "ratio": options.ratio,
            "families": results,
        }
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 1 if any(result["failures"] for result in results) else 0


def family_name(path: str | Path) -> str:
    return Path(path).name.removesuffix(".gz").removesuffix(".jsonl")


def read_family(path: str | Path, limit: int, characters: int) -> dict[str, str]:
    """The first ``characters`` characters of the first ``limit`` texts of a file, by their place in it.

    Raises:
        DataError: the file cannot be read, or holds no text: a family of nothing would pass.
    """
    texts = {str(i): text[:characters] for i, text in enumerate(islice(iter_texts([path]), limit))}
    if not texts:
        raise DataError(f"data file {path}: expected at least one text, got none")
    return texts


def check_family(codec: ZTokCodec, name: str, documents: dict[str, str | bytes], ratio: float) -> dict:
    """Round-trip documents through a saved file; ``failures`` names those that did not come back, and why."""
    originals = list(documents.values())
    began = time.perf_counter()
    z = codec.compress(originals, ratio=ratio, exact=True)
    compressed = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "family.ztok"
        z.save(path)
        file_bytes = path.stat().st_size
        loaded = ZBatch.load(path)
    began_back = time.perf_counter()
    failures = find_failures(codec, loaded, documents)
    ended = time.perf_counter()
    corrections = [document.corrections for document in z.documents]
    return {
        "family": name,
        "texts": len(originals),
        "bytes": sum(len(encoded(original)) for original in originals),
        "tokens": z.tokens,
        "ztokens": z.ztokens,
        "ratio": finite(z.achieved_ratio),
        "rate": finite(z.rate),
        "rate_exact": finite(z.rate_exact),
        "corrected_tokens": sum(len(c.positions) for c in corrections),
        "stored_raw": sum(c.raw is not None for c in corrections),
        "file_bytes": file_bytes,
        "compress_seconds": compressed - began,
        "decompress_seconds": ended - began_back,
        "failures": failures,
    }


def find_failures(codec: ZTokCodec, z: ZBatch, documents: dict[str, str | bytes]) -> dict[str, str]:
    """Documents that did not come back byte for byte, by name, with what happened instead."""
    try:
        decoded = codec.decompress_bytes(z)
    except ValueError:
        # One document fails the whole batch: find out which, and let the others show that they come back.
        decoded = [_alone(codec, one) for one in z]
    failures = {}
    for (name, original), data in zip(documents.items(), decoded, strict=True):
        wanted = encoded(original)
        if isinstance(data, Exception):
            failures[name] = f"{type(data).__name__}: {data}"
        elif data != wanted:
            at = next((i for i, (a, b) in enumerate(zip(data, wanted)) if a != b), min(len(data), len(wanted)))
            failures[name] = f"differs from byte {at} on ({len(data)} bytes came back, {len(wanted)} went in)"
    return failures


def _alone(codec: ZTokCodec, one: ZBatch) -> bytes | Exception:
    try:
        return codec.decompress_bytes(one)[0]
    except ValueError as error:
        return error


def encoded(original: str | bytes) -> bytes:
    """The bytes that have to come back; lone surrogates as the three bytes that UTF-8 would give them."""
    return original if isinstance(original, bytes) else original.encode("utf-8", "surrogatepass")


def finite(value: float) -> float | None:
    """JSON has no NaN: a family without tokens has no ratio."""
    return value if math.isfinite(value) else None


def report(results: list[dict]) -> str:
    """The table, and under it every text that failed."""
    headers = [
        "family",
        "texts",
        "bytes",
        "all bytes returned",
        "text tokens",
        "ratio",
        "rate, bits/token",
        "exact rate, bits/token",
        "stored raw",
        "file bytes",
        "compress s",
        "decompress s",
    ]
    rows = [
        [
            r["family"],
            r["texts"],
            f"{r['bytes']:,}",
            "NO" if r["failures"] else "yes",
            f"{r['tokens']:,}",
            number(r["ratio"]),
            number(r["rate"]),
            number(r["rate_exact"]),
            r["stored_raw"],
            f"{r['file_bytes']:,}",
            number(r["compress_seconds"], 1),
            number(r["decompress_seconds"], 1),
        ]
        for r in results
    ]
    failed = [f"FAILED {r['family']}, {name}: {why}" for r in results for name, why in r["failures"].items()]
    return "\n".join([table(headers, rows), *failed])


if __name__ == "__main__":
    raise SystemExit(main())
