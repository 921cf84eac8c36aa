"""Shows that exact mode gives back every byte: compress, save, load, decompress, compare.

It takes the first characters of the first texts of each JSON-lines file, and always the strings of
:mod:`bench.nasty_strings`. Exit code 0 only when every text of every family came back.

    python -m bench.exact_roundtrip --codec ztok-mini --files data/tasks/*.jsonl.gz
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from bench.machine import environment, write_json
from bench.nasty_strings import LONG, nasty_bytes, nasty_texts
from bench.tables import number, table
from ztok_fast.codec.codec import DEFAULT_CODEC, ZTokCodec
from ztok_fast.codec.zbatch import ZBatch
from ztok_fast.train.text_data import DataError, iter_texts


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.exact_roundtrip", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--codec", default=DEFAULT_CODEC, help=f"codec folder or shipped name (default {DEFAULT_CODEC})")
    add("--ratio", type=float, default=4.0, help="text tokens per Z-token to aim at (default 4)")
    add("--files", nargs="*", default=[], metavar="FILE", help="JSON lines (.gz) with a text field")
    add("--limit", type=int, default=50, help="texts of each file (default 50)")
    add("--characters", type=int, default=2000, help="characters of each text (default 2000)")
    add("--long", type=int, default=LONG, help=f"characters of the longest nasty string (default {LONG})")
    add("--json", metavar="FILE", help="also write the results as JSON")
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
        facts = {"environment": environment("bench.exact_roundtrip", argv), "codec": codec.fingerprint}
        write_json(options.json, {**facts, "ratio": options.ratio, "families": results})
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
    facts = {"family": name, "texts": len(originals), "bytes": sum(len(encoded(original)) for original in originals)}
    facts |= {"tokens": z.tokens, "ztokens": z.ztokens}
    rates = {"ratio": z.achieved_ratio, "rate": z.rate, "rate_exact": z.rate_exact}
    # JSON has no NaN: a family without tokens has no ratio
    facts |= {key: value if math.isfinite(value) else None for key, value in rates.items()}
    facts |= {"corrected_tokens": sum(len(c.positions) for c in corrections)}
    facts |= {"stored_raw": sum(c.raw is not None for c in corrections), "file_bytes": file_bytes}
    seconds = {"compress_seconds": compressed - began, "decompress_seconds": ended - began_back}
    return {**facts, **seconds, "failures": failures}


def find_failures(codec: ZTokCodec, z: ZBatch, documents: dict[str, str | bytes]) -> dict[str, str]:
    """Documents that did not come back byte for byte, by name, with what happened instead."""
    failures = {}
    try:
        decoded = codec.decompress_bytes(z)
    except ValueError:
        # One document fails the whole batch: find out which, and let the others show that they come back.
        decoded = [None] * len(documents)
    for (name, original), one, data in zip(documents.items(), z, decoded, strict=True):
        wanted = encoded(original)
        try:
            data = codec.decompress_bytes(one)[0] if data is None else data
        except ValueError as error:
            failures[name] = f"{type(error).__name__}: {error}"
            continue
        if data != wanted:
            at = next((i for i, (a, b) in enumerate(zip(data, wanted)) if a != b), min(len(data), len(wanted)))
            failures[name] = f"differs from byte {at} on ({len(data)} bytes came back, {len(wanted)} went in)"
    return failures


def encoded(original: str | bytes) -> bytes:
    """The bytes that have to come back; lone surrogates as the three bytes that UTF-8 would give them."""
    return original if isinstance(original, bytes) else original.encode("utf-8", "surrogatepass")


def report(results: list[dict]) -> str:
    """The table, and under it every text that failed."""
    headers = ["family", "texts", "bytes", "all bytes returned", "text tokens", "ratio", "rate, bits/token"]
    headers += ["exact rate, bits/token", "stored raw", "file bytes", "compress s", "decompress s"]
    rows = []
    for r in results:
        row = [r["family"], r["texts"], f"{r['bytes']:,}", "NO" if r["failures"] else "yes", f"{r['tokens']:,}"]
        row += [number(r[name]) for name in ("ratio", "rate", "rate_exact")] + [r["stored_raw"], f"{r['file_bytes']:,}"]
        rows.append([*row, *(number(r[f"{phase}_seconds"], 1) for phase in ("compress", "decompress"))])
    failed = [f"FAILED {r['family']}, {name}: {why}" for r in results for name, why in r["failures"].items()]
    return "\n".join([table(headers, rows), *failed])


if __name__ == "__main__":
    raise SystemExit(main())
