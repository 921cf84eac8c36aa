"""Compress a list of texts with a codec that ships, save them, load them and get them back.

    python examples/compress_corpus.py
    python examples/compress_corpus.py --out corpus.ztok --ratio 2 a.txt b.txt

Without `exact=True` the text that comes back is a guess; with it every byte comes back, or an error.
"""

import argparse
import tempfile
from pathlib import Path

from ztok_fast import ZTokCodec

TEXTS = [
    "The river has been there for as long as anyone in the town can remember.",
    "In the spring it is high and brown, and in the summer it is low and clear.",
    "",
    "Ångström, 東京 and 🙂 come back as well.",
]


def main(argv: list[str] | None = None) -> list[str]:
    """Compress and decompress; returns the texts that came back."""
    parser = argparse.ArgumentParser(description="Compress texts into one .ztok file and read them back.")
    parser.add_argument("files", nargs="*", type=Path, help="UTF-8 texts (default: a few sentences)")
    parser.add_argument("--out", type=Path, help="file to write (default: a temporary one)")
    parser.add_argument("--ratio", type=float, default=4.0, help="text tokens per Z-token (default: 4)")
    options = parser.parse_args(argv)
    texts = [path.read_text(encoding="utf-8") for path in options.files] or TEXTS

    codec = ZTokCodec.from_pretrained("ztok-mini")
    z = codec.compress(texts, ratio=options.ratio, exact=True)
    print(f"{len(z)} texts, {z.tokens} tokens -> {z.ztokens} Z-tokens; {z.rate_exact:.1f} bits per token, exact")
    with tempfile.TemporaryDirectory() as folder:
        path = options.out or Path(folder, "corpus.ztok")
        codec.save(z, path)
        loaded = codec.load(path)
    back = codec.decompress(loaded)
    assert back == texts
    first = codec.decompress(loaded[0])  # one document of the batch alone
    assert first == texts[:1]
    print(f"all came back; the first one: {first[0][:60]!r}")
    return back


if __name__ == "__main__":
    main()
