"""Size and speed of coded units beside general compressors, on files or on texts of a JSON-lines file.

python -m bench.files LICENSE README.md
python -m bench.files --jsonl data/dev.jsonl.gz --characters 2000 --documents 40
"""

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

from bench.base_bits import read_texts
from ztok_fast.codec.coded import TextCoder
from ztok_fast.codec.coded_file import parts_of, read_coded, write_coded

Codec = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def compressors() -> dict[str, Codec]:
    """General compressors at their strongest setting, as far as their packages are installed."""
    found: dict[str, Codec] = {
        "zlib -9": (lambda data: zlib.compress(data, 9), zlib.decompress),
        "bzip2 -9": (lambda data: bz2.compress(data, 9), bz2.decompress),
        "xz -9e": (lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
    }
    if importlib.util.find_spec("zstandard"):
        import zstandard

        found["zstd -19"] = (zstandard.ZstdCompressor(level=19).compress, zstandard.ZstdDecompressor().decompress)
    if importlib.util.find_spec("brotli"):
        import brotli

        found["brotli -11"] = (lambda data: brotli.compress(data, quality=11), brotli.decompress)
    if importlib.util.find_spec("pyppmd"):
        import pyppmd

        found["PPMd"] = (pyppmd.compress, pyppmd.decompress)
    return found


def coded(coder: TextCoder) -> Codec:
    """Whole files of coded units, without the verification."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "x.ztok"

    def compress(data: bytes) -> bytes:
        write_coded(path, parts_of(io.BytesIO(data)), coder, verify=False)
        return path.read_bytes()

    def decompress(data: bytes, keep=folder) -> bytes:
        path.write_bytes(data)
        return b"".join(text for text, _ in read_coded(path, coder))

    return compress, decompress


def measure(codec: Codec, texts: list[bytes]) -> dict[str, float]:
    """Bits per byte of separate files, and kB/s both ways."""
    start = time.perf_counter()
    packed = [codec[0](text) for text in texts]
    middle = time.perf_counter()
    back = [codec[1](data) for data in packed]
    end = time.perf_counter()
    if back != texts:
        raise SystemExit("a compressor did not give the text back")
    size = sum(map(len, texts))
    return {
        "bytes": sum(map(len, packed)),
        "bits_per_byte": 8 * sum(map(len, packed)) / size,
        "compress_kb_s": size / 1e3 / (middle - start),
        "decompress_kb_s": size / 1e3 / (end - middle),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--jsonl", type=Path)
    parser.add_argument("--characters", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--base", help="base model of the coder (default: mini-base)")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    sets = {path.name: [path.read_bytes()] for path in options.files}
    if options.jsonl:
        found = read_texts(options.jsonl, options.characters, options.documents)
        sets |= {source: [text.encode() for text in texts] for source, texts in found.items()}
    if not sets:
        parser.error("expected files or --jsonl, got neither")
    everything = {"coded": coded(TextCoder.from_pretrained(options.base, context=options.context)), **compressors()}
    results = []
    print("| text | bytes of text | compressor | bytes | bits per byte | compress kB/s | decompress kB/s |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for name, texts in sets.items():
        for label, codec in everything.items():
            got = measure(codec, texts)
            results.append(
                {"text": name, "files": len(texts), "size": sum(map(len, texts)), "compressor": label, **got}
            )
            print(
                f"| {name} ({len(texts)}) | {results[-1]['size']:,} | {label} | {got['bytes']:,} "
                f"| {got['bits_per_byte']:.3f} | {got['compress_kb_s']:,.0f} | {got['decompress_kb_s']:,.0f} |"
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
