"""A tiny coder, documents of every kind for it, files of them, and what damages a file of any form."""

import io
import random

from tests.codec.tiny_base import tiny_model, tiny_tokenizer
from ztok_fast.codec.base_model import load_base
from ztok_fast.codec.coded import TextCoder
from ztok_fast.codec.coded_file import read_coded
from ztok_fast.codec.coded_writer import write_coded
from ztok_fast.codec.container import HEADER_BYTES, Head, Index, form_of, read_records
from ztok_fast.codec.container_writer import parts_of
from ztok_fast.codec.varint import varint

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


def records_of(path) -> list[tuple[int, int, Head]]:
    """Begin, end and head of each record of a file of any form."""
    index, found = Index(), []
    with open(path, "rb") as stream:
        stream.seek(HEADER_BYTES)
        for head in read_records(stream, index, path.stat().st_size, form_of(path)):
            found.append((index.at, head))
    begins = [HEADER_BYTES, *(end for end, _ in found)]
    return [(begin, end, head) for begin, (end, head) in zip(begins, found)]


def bounds_of(path, data: bytes) -> list[tuple[int, int]]:
    """Begin and end of each record of a file's bytes, which are written there."""
    path.write_bytes(data)
    return [(begin, end) for begin, end, _ in records_of(path)]


def altered(draw: random.Random, data: bytes, records: list[tuple[int, int]], foreign: bytes) -> bytes:
    """A file with one or two faults."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2))):
        kind = draw.randrange(9)
        size = len(found)
        at = draw.randrange(size)
        if kind == 0:  # a bit, anywhere or in the first bytes of a record
            at = draw.choice((at, min(size - 1, draw.choice(records)[0] + draw.randrange(12))))
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del found[at:]
        elif kind == 2:  # lengths
            at = min(size - 1, draw.choice(records)[0] + 1)
            value = draw.choice((0, 1, 127, 1 << 14, 1 << 20, (1 << 20) + 1, 1 << 40, (1 << 62) + 5))
            found[at : at + draw.randrange(4)] = varint(value)
        elif kind == 3:  # records change places
            (a, b), (c, d) = sorted((draw.choice(records), draw.choice(records)))
            if b <= c:
                found[a:d] = found[c:d] + found[b:c] + found[a:b]
        elif kind == 4:  # one is left out, or doubled
            begin, end = draw.choice(records)
            found[begin:end] = found[begin:end] * draw.choice((0, 2))
        elif kind == 5:  # another coder's, another version
            found[:HEADER_BYTES] = draw.choice((foreign[:HEADER_BYTES], draw.randbytes(HEADER_BYTES)))
        elif kind == 6:
            found[at : at + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
        elif kind == 7:  # a stretch from elsewhere in the file
            begin = draw.randrange(size)
            found[at : at + 16] = found[begin : begin + 16]
        else:
            found += draw.choice((b"\0", draw.randbytes(20), bytes(found[-20:])))
        if not found:
            break
    return bytes(found)
