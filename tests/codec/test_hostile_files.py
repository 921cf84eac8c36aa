"""Files that were altered: a clear error or the exact text; never another text, a crash, a hang, or much memory.

10,000 alterations are made with `-m slow`; a sample of them runs always. The seed of one that fails is in its message.
"""

import random
import time

import pytest
import torch

from tests.codec.coded_files import altered, bounds_of, documents, read, tiny_coder, words, write
from ztok_fast.cli.profile_machine import memory, reset_peak
from ztok_fast.codec import container
from ztok_fast.codec.base_model import load_base
from ztok_fast.codec.coded import TextCoder
from ztok_fast.codec.coded_file import CodedFile
from ztok_fast.codec.container import HEADER_BYTES, RUN
from ztok_fast.codec.errors import ZFileError
from ztok_fast.codec.varint import varint

MOST_SECONDS, MOST_FACTOR = 20, 64
BASE_BYTES = 24 << 20
"""What a part may take, whatever the file: 1 MiB of text packed into little is a valid file."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="module")
def coder(folder):
    return tiny_coder(folder)


@pytest.fixture(scope="module")
def other(folder, coder):
    """The identity of another coder, and a file of it."""
    return TextCoder(coder.base, "float32", context=16, rows=8)


def samples(folder, coder) -> list[tuple[bytes, list[bytes]]]:
    """Files with their documents: one of each kind of record, some together, and many with an index."""
    draw = random.Random(0)
    kinds = [[words(draw, 9)], [b"\xff raw"], [b"abc" * 50], [b""], [words(draw, 60), b"", b"\xfe", b"x" * 99]]
    long = [draw.randbytes((1 << 20) + 99), words(draw, 3)]
    found = []
    for texts in (*kinds, long, documents(300)):
        write(folder / "sample.ztok", texts, coder, verify=False)
        found.append(((folder / "sample.ztok").read_bytes(), texts))
    return found


def outcome(path, coder, texts: list[bytes], data: bytes, seed: int) -> bool:
    """Whether a file is read as these texts; everything but a clear error is a failure."""
    path.write_bytes(data)
    started, right, before = time.perf_counter(), False, memory("VmRSS")
    reset_peak()
    try:
        found = read(path, coder)
        assert found == texts, f"seed {seed}: another text"
        right = True
    except ZFileError as error:
        message = str(error)
        assert str(path) in message and ("expected" in message or "damaged" in message), f"seed {seed}: {message}"
    peak = memory("VmHWM") - before
    assert peak <= MOST_FACTOR * len(data) + BASE_BYTES, f"seed {seed}: {peak} bytes for a file of {len(data)}"
    assert time.perf_counter() - started < MOST_SECONDS, f"seed {seed}: a hang"
    return right


def some_document(path, coder, texts: list[bytes], draw: random.Random, seed: int) -> None:
    """The same for a document at random."""
    number = draw.randrange(len(texts))
    try:
        with CodedFile(path, coder) as file:
            assert file[number] == texts[number], f"seed {seed}: another text for document {number}"
    except ZFileError as error:
        assert str(path) in str(error), f"seed {seed}: {error}"
    except IndexError as error:  # fewer documents, as the heads that are not decoded say
        assert "document: expected" in str(error), f"seed {seed}: {error}"


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_an_altered_file_is_an_error_or_the_same(tmp_path, folder, coder, other, count):
    write(tmp_path / "foreign", [b"text"], other)
    foreign = (tmp_path / "foreign").read_bytes()
    found = samples(folder, coder)
    records = [bounds_of(tmp_path / "sample", data) for data, _ in found]
    # Files of a megabyte take longest: fewer of them.
    chances = [8 if len(data) < 10_000 else 1 for data, _ in found]
    right = 0
    for seed in range(count):
        draw = random.Random(seed)
        index = draw.choices(range(len(found)), chances)[0]
        data, texts = found[index]
        changed = altered(draw, data, records[index], foreign)
        right += outcome(tmp_path / "x.ztok", coder, texts, changed, seed)
        some_document(tmp_path / "x.ztok", coder, texts, draw, seed)
        if changed == data:
            right -= 1
    assert right < count / 10  # nearly all alterations are noticed


def test_each_kind_of_damage_has_its_message(tmp_path, coder, other):
    path = tmp_path / "x.ztok"
    write(path, [b"", b"\xff raw", b"abc" * 50, b"the small text is a text"], coder)
    data = path.read_bytes()
    records = bounds_of(path, data)

    def message(changed: bytes, own=coder) -> str:
        path.write_bytes(changed)
        with pytest.raises(ZFileError) as caught:
            read(path, own)
        return str(caught.value)

    begin, end = records[1]
    assert "expected the end" in message(data + b"\0")
    assert "truncated" in message(data[:-1]) and "truncated" in message(data[: records[2][0]])
    assert "another kind" in message(b"XC" + data[2:])
    assert "expected version 2 of coded units, got 1" in message(data[:2] + bytes([data[2] ^ 0x30]) + data[3:])
    assert "of coder" in message(data[:5] + bytes([data[5] ^ 1]) + data[6:])
    assert "of coder" in message(data, other)
    assert "kind of storage" in message(data[:begin] + bytes([data[begin] | 5]) + data[begin + 1 :])
    assert "the hash" in message(data[: end - 1] + b"?" + data[end:])
    assert "the hash" in message(data[:begin] + data[end:])
    assert "at most" in message(data[: records[3][0] + 1] + varint(1 << 30) + data[records[3][0] + 2 :])
    size = (1 << 39).to_bytes(5, "little")
    assert "expected 549755813888 bytes" in message(data[:HEADER_BYTES] + bytes([RUN]) + size + bytes(8))


def test_an_altered_index_is_an_error(tmp_path, coder):
    texts = documents(700)
    write(tmp_path / "x.ztok", texts, coder, verify=False)
    data = (tmp_path / "x.ztok").read_bytes()
    index = len(data) - 12 - int.from_bytes(data[-4:], "little")
    for at in range(index, len(data)):
        changed = bytearray(data)
        changed[at] ^= 1
        (tmp_path / "y.ztok").write_bytes(changed)
        with pytest.raises(ZFileError, match=r"y.ztok: (index|record)"):
            CodedFile(tmp_path / "y.ztok", coder)
    for at in (index, len(data) - 5):
        changed = bytearray(data)
        changed[at] ^= 1
        (tmp_path / "y.ztok").write_bytes(changed)
        with pytest.raises(ZFileError, match="expected the end of the file"):
            read(tmp_path / "y.ztok", coder)
    # A forged index, with a right hash, that says that documents are elsewhere.
    header = container.header_with_index(data[:HEADER_BYTES])
    for numbers in ((255, 9, 99), (1 << 62, 9, 99), (255, 9, 1 << 62), (255, 1 << 62, 4), ()):
        entries = b"".join(map(varint, numbers))
        tail = entries + container.digest_of(header + entries) + len(entries).to_bytes(4, "little")
        (tmp_path / "y.ztok").write_bytes(data[:index] + tail)
        with pytest.raises(ZFileError, match=r"y.ztok: (index|record)"):
            CodedFile(tmp_path / "y.ztok", coder)


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_instruction_sets_read_each_other(tmp_path, folder, coder, precision):
    """Files written under one instruction set have the bytes of, and are read under, each other."""
    own = TextCoder(load_base(str(folder)), precision, context=16, rows=4)
    texts, written = documents(40), []
    found = torch.ops.ztok.isa_native(-1)
    # The best products of int8 for each, and every other that this processor has with its best.
    sets = [(isa, -1) for isa in range(found + 1)]
    sets += [(found, products) for products in range(8) if torch.ops.ztok.int8_isa_native(products) == products]
    try:
        for number, (isa, products) in enumerate(sets):
            assert torch.ops.ztok.isa_native(isa) == isa
            torch.ops.ztok.int8_isa_native(products)
            write(tmp_path / f"{number}.ztok", texts, own, verify=False)
            written.append((tmp_path / f"{number}.ztok").read_bytes())
        for number, (isa, products) in enumerate(sets):
            torch.ops.ztok.isa_native(isa)
            torch.ops.ztok.int8_isa_native(products)
            assert read(tmp_path / f"{number - 1 if number else len(sets) - 1}.ztok", own) == texts, sets[number]
    finally:
        torch.ops.ztok.isa_native(found)
        torch.ops.ztok.int8_isa_native(-1)
    assert len(sets) > found and set(written) == {written[0]}
