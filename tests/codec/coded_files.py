"""A tiny coder, documents of every kind for it, and files of them."""

import io
import random

from tests.codec.tiny_base import tiny_model, tiny_tokenizer
from ztok_fast.codec.base_model import load_base
from ztok_fast.codec.coded import TextCoder
from ztok_fast.codec.coded_file import parts_of, read_coded
from ztok_fast.codec.coded_writer import write_coded

WORDS = "a small text to learn a few merges from, as small texts go; the text is small".split()
"""What the tiny tokenizer has tokens for: such texts are coded."""


def tiny_coder(folder, context: int = 16, rows: int = 8) -> TextCoder:
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), num_attention_heads=2, num_key_value_heads=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return TextCoder(load_base(str(folder)), context=context, rows=rows)


def words(draw: random.Random, count: int) -> bytes:
    return " ".join(draw.choice(WORDS) for _ in range(count)).encode()


def documents(count: int, seed: int = 0) -> list[bytes]:
    """Short texts that are coded, stored raw, packed, or empty."""
    draw = random.Random(seed)
    kinds = (
        lambda: words(draw, draw.randrange(1, 12)),
        lambda: draw.randbytes(draw.randrange(1, 30)),
        lambda: b"\xffab" * draw.randrange(20, 90),
        lambda: b"",
    )
    return [draw.choices(kinds, (6, 2, 1, 1))[0]() for _ in range(count)]


def write(path, texts, coder, **options) -> int:
    return write_coded(path, (part for text in texts for part in parts_of(io.BytesIO(text))), coder, **options)


def read(path, coder) -> list[bytes]:
    found, going = [], False
    for text, goes_on in read_coded(path, coder):
        found.append((found.pop() if going else b"") + text)
        going = goes_on
    return found
