"""``ztok bench files``: size and speed of coded units beside general compressors, on the user's own files."""

from __future__ import annotations

import argparse
import bz2
import importlib.util
import io
import json
import lzma
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ztok_fast.cli import common, report

if TYPE_CHECKING:
    from ztok_fast.codec.coded import TextCoder

Compressor = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]
"""Compressing, and its inverse."""

CODED = "coded"
PACKAGES = {"zstandard": "zstd -19", "brotli": "brotli -11", "pyppmd": "PPMd -o8"}
WAYS, UNITS = ("compress", "decompress"), ("MB/s", "tokens/s")
LEAST_SECONDS, MOST_ROUNDS = 0.1, 50
"""A general compressor is timed over as many rounds as take so long; the fastest of them counts."""

EPILOG = """\
Each FILE is compressed on its own. A FILE.jsonl or FILE.jsonl.gz holds a text in the field `text` of every row: each is
a file of its own, and those with the same `source` are reported together. Sizes are those of whole files, headers
included. Coded units are written without verification and read back once, as every text is by every compressor.
"""


def add_command(kinds) -> None:
    parser = kinds.add_parser(
        "files",
        help="size and speed of coded units beside zlib, bzip2, xz, zstd, brotli and PPMd",
        description="Compress files with coded units and with general compressors at their strongest settings: total "
        "size, bits per byte and speed. zstd, brotli and PPMd need the packages zstandard, brotli and pyppmd.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="any files; texts in JSON lines; - for stdin")
    parser.add_argument("--base", metavar="NAME|FOLDER", help="base model of the coded units (default: mini-base)")
    parser.add_argument("--engine", default="int8", choices=("int8", "float32"), help="its arithmetic (default: int8)")
    parser.add_argument(
        "--context", type=int, default=512, metavar="N", help="tokens read together, a power of two (default: 512)"
    )
    parser.add_argument("--characters", type=int, metavar="N", help="of a text in JSON lines, use the first N")
    parser.add_argument("--documents", type=int, metavar="N", help="of a source in JSON lines, use the first N texts")
    parser.add_argument("--json", metavar="OUT", help="also write the results to a JSON file")
    parser.add_argument("--markdown", metavar="OUT.md", help="also write them as Markdown tables")
    parser.add_argument("--plot", metavar="OUT.png", help="also draw them; needs ztok-fast[bench]")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    outputs = _check(options)
    sets = read_sets(options)
    from ztok_fast.codec.base_model import load_base
    from ztok_fast.codec.coded import DEFAULT_BASE, TextCoder

    coder = TextCoder(load_base(str(options.base or DEFAULT_BASE)), options.engine, options.context)
    result = {"base": options.base or "mini-base", **measure(coder, sets)}
    from ztok_fast.files import replace_atomically

    for name, text in (("json", json.dumps(result, indent=1) + "\n"), ("markdown", render(result, markdown=True))):
        if name in outputs:
            with replace_atomically(outputs[name]) as temporary:
                temporary.write_text(text, encoding="utf-8")
    if "plot" in outputs:
        from ztok_fast.cli.profile_plot import draw_files

        with replace_atomically(outputs["plot"]) as temporary:
            draw_files(result, totals(result["results"]), temporary)
    print(render(result), end="")
    return 0


def _check(options: argparse.Namespace) -> dict[str, Path]:
    """Refuse what cannot be done, before any work; the output files that are asked for."""
    for name in ("characters", "documents"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise common.UsageError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.files.count("-") > 1:
        raise common.UsageError("FILE: expected stdin (-) at most once")
    named = [name for name in options.files if name != "-"]
    for name in named:
        common.check_input(name)
    return common.check_outputs(options, (("json", None), ("markdown", ".md"), ("plot", ".png")), named)


def read_sets(options: argparse.Namespace) -> dict[str, list[bytes]]:
    """Texts by name: one of a file, those of a source of JSON lines.

    Raises:
        DataError: a file of JSON lines that is none.
        UsageError: no text at all.
    """
    from ztok_fast.train.text_data import iter_rows

    sets: dict[str, list[bytes]] = {}
    for name in options.files:
        if name.endswith((".jsonl", ".jsonl.gz")):
            for row in iter_rows(name):
                own = sets.setdefault(str(row.get("source") or Path(name).name), [])
                if options.documents is None or len(own) < options.documents:
                    own.append(row["text"][: options.characters].encode("utf-8", "surrogatepass"))
        else:
            label = "stdin" if name == "-" else Path(name).name
            sets[name if label in sets else label] = [common.read_bytes(name)]
    if not any(text for texts in sets.values() for text in texts):
        raise common.UsageError("FILE: expected at least one byte of text, got none")
    return {name: texts for name, texts in sets.items() if any(texts)}


def general_compressors() -> dict[str, Compressor]:
    """General compressors at their strongest usual settings, as far as their packages are installed."""
    found: dict[str, Compressor] = {
        "zlib -9": (lambda data: zlib.compress(data, 9), zlib.decompress),
        "bzip2 -9": (lambda data: bz2.compress(data, 9), bz2.decompress),
        "xz -9e": (lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
    }
    if importlib.util.find_spec("zstandard"):
        import zstandard

        found[PACKAGES["zstandard"]] = (
            lambda data: zstandard.ZstdCompressor(level=19).compress(data),
            lambda data: zstandard.ZstdDecompressor().decompress(data),
        )
    if importlib.util.find_spec("brotli"):
        import brotli

        found[PACKAGES["brotli"]] = (lambda data: brotli.compress(data, quality=11), brotli.decompress)
    if importlib.util.find_spec("pyppmd"):
        import pyppmd

        setting = {"max_order": 8, "mem_size": 64 << 20}
        found[PACKAGES["pyppmd"]] = (
            lambda data: pyppmd.compress(data, **setting),
            lambda data: pyppmd.decompress(data, **setting),
        )
    return found


def coded_files(coder: TextCoder, path: Path) -> Compressor:
    """Whole files of coded units, by way of the file ``path``."""
    from ztok_fast.codec.coded_file import read_coded
    from ztok_fast.codec.coded_writer import write_coded
    from ztok_fast.codec.container_writer import parts_of

    def compress(data: bytes) -> bytes:
        write_coded(path, parts_of(io.BytesIO(data)), coder, verify=False)
        return path.read_bytes()

    def decompress(data: bytes) -> bytes:
        path.write_bytes(data)
        return b"".join(text for text, _ in read_coded(path, coder))

    return compress, decompress


def measure(coder: TextCoder, sets: dict[str, list[bytes]]) -> dict:
    """Sizes and times of all compressors on all texts, JSON-serialisable."""
    import torch

    from ztok_fast import doctor
    from ztok_fast.codec.text import tokenize

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ways = {CODED: coded_files(coder, Path(folder) / "x.ztok"), **general_compressors()}
        ways[CODED][1](ways[CODED][0](b"The first pass takes longer."))
        for name, texts in sets.items():
            read = tokenize(coder.base.tokenizer, [text.decode("utf-8", "replace") for text in texts])
            tokens = sum(map(len, read))
            for label, way in ways.items():
                rows.append({"text": name, "files": len(texts), "size": sum(map(len, texts)), "tokens": tokens})
                rows[-1] |= {"compressor": label, **_measure(label, way, texts)}
    return {
        "engine": coder.engine.precision,
        "context": coder.context,
        "threads": torch.get_num_threads(),
        "results": rows,
        "missing": {own: label for own, label in PACKAGES.items() if label not in ways},
        "environment": doctor.environment(),
    }


def _measure(label: str, way: Compressor, texts: list[bytes]) -> dict[str, float]:
    """Bytes of separate files, and the seconds of both directions."""
    both: list[list[float]] = [[], []]
    begun = time.perf_counter()
    while True:
        start = time.perf_counter()
        packed = [way[0](text) for text in texts]
        middle = time.perf_counter()
        back = [way[1](data) for data in packed]
        end = time.perf_counter()
        if back != texts:
            raise common.UsageError(f"{label}: expected the text back, got another: this is no measurement")
        both[0].append(middle - start)
        both[1].append(end - middle)
        if label == CODED or end - begun > LEAST_SECONDS or len(both[0]) == MOST_ROUNDS:
            return {
                "bytes": sum(map(len, packed)),
                "compress_seconds": min(both[0]),
                "decompress_seconds": min(both[1]),
            }


def totals(rows: list[dict]) -> list[dict]:
    """One row for each compressor, over all texts."""
    found: dict[str, dict] = {}
    for row in rows:
        own = found.setdefault(row["compressor"], {"compressor": row["compressor"]})
        for key in ("files", "size", "tokens", "bytes", "compress_seconds", "decompress_seconds"):
            own[key] = own.get(key, 0) + row[key]
    return list(found.values())


def render(result: dict, markdown: bool = False) -> str:
    """What ``ztok bench files`` prints: bits per byte by text, then sizes and speeds of all texts together."""
    rows = result["results"]
    labels = list(dict.fromkeys(row["compressor"] for row in rows))
    sizes = {(row["text"], row["compressor"]): row for row in rows}
    names = list(dict.fromkeys(row["text"] for row in rows))
    by_text = []
    for name in names:
        first = sizes[name, labels[0]]
        bits = [8 * sizes[name, label]["bytes"] / first["size"] for label in labels]
        shown = [report.number(value, 3) for value in bits]
        if markdown:
            best = bits.index(min(bits))
            shown[best] = f"**{shown[best]}**"
        by_text.append((f"{name} ({first['files']})", f"{first['size']:,}", *shown))
    whole = []
    for row in totals(rows):
        both = (row["compress_seconds"], row["decompress_seconds"])
        speeds = [report.number(row["size"] / 1e6 / seconds, 3) for seconds in both]
        per_token = [f"{row['tokens'] / seconds:,.0f}" if row["compressor"] == CODED else "-" for seconds in both]
        rate = report.number(8 * row["bytes"] / row["size"], 3)
        whole.append((row["compressor"], f"{row['bytes']:,}", rate, *speeds, *per_token))
    cpu = result["environment"]["cpu"]["model"]
    head = (
        f"{sum(sizes[name, labels[0]]['files'] for name in names):,} files, "
        f"{sum(sizes[name, labels[0]]['size'] for name in names):,} bytes; coded units with {result['base']}, "
        f"engine {result['engine']}, context {result['context']}; {cpu}, {result['threads']} threads"
    )
    make = _markdown if markdown else report.table
    found = [
        head,
        make(("bits per byte (files)", "bytes", *labels), by_text),
        make(("all files", "bytes", "bits/byte", *(f"{way} {unit}" for unit in UNITS for way in WAYS)), whole),
    ]
    if result["missing"]:
        lacking = ", ".join(f"{label} (pip install {own})" for own, label in result["missing"].items())
        found.append(f"Not installed and left out: {lacking}")
    return "\n\n".join(found) + "\n"


def _markdown(header, rows) -> str:
    rule = ("---", *("---:" for _ in header[1:]))
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
