"""The container of coded units: sizes, one document of many, runs that are killed, constant memory."""

import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.codec.coded_files import documents, read, records_of, tiny_coder, words, write
from ztok_fast.codec import coded_file, container, container_writer
from ztok_fast.codec.coded import CODED, LZMA, RAW
from ztok_fast.codec.coded_file import CodedFile
from ztok_fast.codec.coded_writer import write_coded
from ztok_fast.codec.container import CODED_FORM, RUN, STRETCH, read_head
from ztok_fast.codec.container_file import stored_length
from ztok_fast.codec.errors import CodecError, ZFileError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    return tiny_coder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def short_parts(monkeypatch):
    """Parts of 100 bytes, so that short documents have many."""
    for module in (coded_file, container, container_writer):
        monkeypatch.setattr(module, "PART_BYTES", 100)
    monkeypatch.setattr(coded_file, "BLOCK_BYTES", 400)


def heads(path) -> list:
    return [head for _, _, head in records_of(path)]


# Sizes


@pytest.mark.parametrize("size", [0, 1, 99, 127, 128, 16_383, 16_384, 100_000, (1 << 20) - 1])
def test_at_most_24_bytes_are_around_one_document(tmp_path, coder, size):
    noise = random.Random(size).randbytes(size)
    assert write(tmp_path / "x.ztok", [noise], coder) <= size + 24
    assert read(tmp_path / "x.ztok", coder) == [noise]
    packed = b"\xff" + b"ab" * (size // 2)
    around = write(tmp_path / "x.ztok", [packed], coder) - heads(tmp_path / "x.ztok")[0].stored
    assert around <= 24 and read(tmp_path / "x.ztok", coder) == [packed]


def test_no_file_is_much_larger_than_its_documents(tmp_path, coder, short_parts):
    """At most 32 bytes more for one document and 16 for each further one, whatever is in them."""
    draw = random.Random(0)
    hard = [draw.randbytes(size) for size in (0, 1, 99, 100, 101, 1000, 3000)]
    mixed = [draw.randbytes(150) + words(draw, 40) + draw.randbytes(250) + words(draw, 40) + draw.randbytes(9)]
    for texts in ([hard[0]], [hard[5]], [hard[6]], hard, hard * 80, mixed, mixed * 3, [b""] * 600, [b"\xc3"] * 600):
        size = write(tmp_path / "x.ztok", texts, coder)
        assert size == (tmp_path / "x.ztok").stat().st_size
        assert size <= sum(map(len, texts)) + 32 + 16 * (len(texts) - 1)
        assert read(tmp_path / "x.ztok", coder) == texts


def test_noise_of_many_parts_is_one_record(tmp_path, coder):
    noise = random.Random(1).randbytes((2 << 20) + 5)
    assert write(tmp_path / "x.ztok", [noise], coder) <= len(noise) + 32
    assert [head.kind for head in heads(tmp_path / "x.ztok")] == [RUN]
    with CodedFile(tmp_path / "x.ztok", coder) as file:
        assert file[0] == noise and list(map(len, file.parts(0))) == [1 << 20, 1 << 20, 5]


# One document of many


@pytest.mark.parametrize("count", [1, 2, STRETCH, STRETCH + 1, 2 * STRETCH, 700])
def test_any_document_is_read_without_the_others(tmp_path, coder, count):
    texts = documents(count, seed=count)
    write(tmp_path / "x.ztok", texts, coder, verify=False)
    if count > 20:
        assert {head.kind for head in heads(tmp_path / "x.ztok")} == {CODED, RAW, LZMA}
    assert stored_length(tmp_path / "x.ztok", CODED_FORM) == (count, sum(map(len, texts)))
    with CodedFile(tmp_path / "x.ztok", coder) as file:
        assert (len(file), file.text_bytes) == (count, sum(map(len, texts)))
        assert file[-1] == texts[-1] and file[0] == texts[0]
        for number in random.Random(2).choices(range(count), k=40):
            assert file[number] == texts[number]
        assert list(file) == texts
        for number in (count, -count - 1):
            with pytest.raises(IndexError, match=f"got {number}"):
                file[number]


def test_documents_of_many_parts_are_read_at_random(tmp_path, coder, short_parts):
    draw = random.Random(3)
    texts = [
        b"".join(draw.choice((words(draw, 30), draw.randbytes(170), b"")) for _ in range(draw.randrange(6)))
        for _ in range(160)
    ]
    write(tmp_path / "x.ztok", texts, coder, verify=False)
    assert RUN in {head.kind for head in heads(tmp_path / "x.ztok")} and len(heads(tmp_path / "x.ztok")) > STRETCH
    assert read(tmp_path / "x.ztok", coder) == texts
    with CodedFile(tmp_path / "x.ztok", coder) as file:
        assert [file[number] for number in reversed(range(len(texts)))] == texts[::-1]
        # Two documents at the same time.
        assert [part for pair in zip(file.parts(5), file.parts(7)) for part in pair][:2] == [
            next(file.parts(5)),
            next(file.parts(7)),
        ]


def test_only_the_document_is_decoded(tmp_path, coder, monkeypatch):
    texts = documents(600)
    write(tmp_path / "x.ztok", texts, coder, verify=False)
    seen, decode = [], coder.decode
    monkeypatch.setattr(
        coder, "decode", lambda parts, lengths, progress=None: seen.extend(parts) or decode(parts, lengths)
    )
    read_heads = []
    monkeypatch.setattr(container, "read_head", lambda *args: read_heads.append(1) or read_head(*args))
    with CodedFile(tmp_path / "x.ztok", coder) as file:
        opened = len(read_heads)
        assert file[300] == texts[300] and len(seen) == 1
    assert opened <= STRETCH and len(read_heads) - opened <= STRETCH + 1  # its own


# Runs that are killed

SCRIPT = """
import sys, time
from tests.codec.coded_files import documents, tiny_coder
from tests.codec.test_coded_file import long_documents, slowly
from ztok_fast.codec import coded_file
from ztok_fast.codec.coded_writer import write_coded
coded_file.BLOCK_BYTES = 2000
write_coded(sys.argv[2], slowly(long_documents()), tiny_coder(sys.argv[1]))
"""


def long_documents() -> list[bytes]:
    return [*documents(300, seed=5), random.Random(6).randbytes(2 << 20), *documents(300, seed=7)]


def slowly(texts):
    for index, text in enumerate(texts):
        if index == 500:
            print("here", flush=True)
            time.sleep(60)  # the test kills this process here
        yield from container_writer.parts_of(io.BytesIO(text))


def test_a_killed_run_is_gone_on_from(tmp_path, coder, monkeypatch):
    monkeypatch.setattr(coded_file, "BLOCK_BYTES", 2000)
    texts = long_documents()
    write(tmp_path / "whole.ztok", texts, coder)
    target, partial = tmp_path / "x.ztok", tmp_path / "x.ztok.partial"
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "base"), str(target)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=ENVIRONMENT) as run:
        assert run.stdout.readline() == b"here\n"
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    kept = partial.read_bytes()
    whole = (tmp_path / "whole.ztok").read_bytes()
    assert not target.exists() and len(kept) > 2 << 20
    assert kept[3:] == whole[3 : len(kept)]  # the byte before them says whether there is an index
    encoded, encode = [], coder.encode
    monkeypatch.setattr(coder, "encode", lambda texts, progress: encoded.extend(texts) or encode(texts, progress))
    write(target, texts, coder)
    assert target.read_bytes() == whole and not partial.exists()
    assert 101 <= len(encoded) < 101 + 100  # what was not read, and at most the block in work


@pytest.mark.parametrize("kind", ["few", "many", "long", "one"])
def test_a_file_cut_anywhere_is_gone_on_from(tmp_path, coder, short_parts, kind):
    draw = random.Random(8)
    long = [draw.randbytes(350), words(draw, 90) + draw.randbytes(250), words(draw, 50)]
    texts = {"few": documents(9), "many": documents(STRETCH + 9), "long": long, "one": [draw.randbytes(950)]}[kind]
    write(tmp_path / "whole.ztok", texts, coder, verify=False)
    whole = (tmp_path / "whole.ztok").read_bytes()
    partial, target = tmp_path / "x.ztok.partial", tmp_path / "x.ztok"
    states = [whole[:cut] for cut in draw.sample(range(len(whole) + 1), 20)]
    # What is on the disk whenever a part is asked for, and then the next one up to some byte.
    pieces = [part for text in texts for part in container_writer.parts_of(io.BytesIO(text))]

    def watched():
        for piece in pieces:
            if partial.exists() and draw.random() < 8 / len(pieces):
                states.append(partial.read_bytes())
                states.append(states[-1] + bytes(container.RUN_HEAD_BYTES) + piece[0][:50])
                states.append(states[-1] + piece[0][:50])
            yield piece

    write_coded(target, watched(), coder, verify=False)
    assert target.read_bytes() == whole and len(states) > 23
    for state in states:
        partial.write_bytes(state)
        write(target, texts, coder, verify=False)
        assert target.read_bytes() == whole, state
    # What is there belongs to other texts, from some byte on.
    other = [*texts[:-1], texts[-1][:-1] + b"?"]
    write(target, other, coder, verify=False)
    partial.write_bytes(target.read_bytes())
    write(target, texts, coder, verify=False)
    assert target.read_bytes() == whole


def test_progress_counts_every_byte_once(tmp_path, coder, short_parts):
    texts = [*documents(50), random.Random(9).randbytes(950)]
    size = sum(map(len, texts))
    for verify in (False, True):
        counts = []
        write(tmp_path / "x.ztok", texts, coder, verify=verify, progress=counts.append)
        assert sum(counts) == size and min(counts) >= 0
    counts = []
    (tmp_path / "x.ztok.partial").write_bytes((tmp_path / "x.ztok").read_bytes()[:500])
    write(tmp_path / "x.ztok", texts, coder, progress=counts.append)
    assert sum(counts) == size
    counts = []
    list(coded_file.read_coded(tmp_path / "x.ztok", coder, counts.append))
    assert sum(counts) == size


# Memory

MEMORY = """
import io, random, resource, sys
from tests.codec.coded_files import tiny_coder, words
from ztok_fast.codec.coded_file import read_coded
from ztok_fast.codec.coded_writer import write_coded
from ztok_fast.codec.container_writer import parts_of

class Endless(io.RawIOBase):
    "So many MB of noise, of lines that are no UTF-8, and of words."
    def __init__(self, megabytes):
        self.left = megabytes << 20
        self.draw = random.Random(0)
        self.block = [self.draw.randbytes(1 << 16), b"one line of a log \\xff\\n" * 3000, words(self.draw, 40)]
    def read(self, size):
        text = b""
        while self.left > 0 and len(text) < size:
            text += self.draw.choices(self.block, (1, 8, 8))[0][: size - len(text)]
        self.left -= len(text)
        return text

def run(megabytes):
    write_coded(sys.argv[2], parts_of(Endless(megabytes)), coder, verify=False)
    return sum(len(text) for text, _ in read_coded(sys.argv[2], coder))

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
coder = tiny_coder(sys.argv[1])
run(4)
before = peak()
size = run(int(sys.argv[3]))
print(size >> 20, peak() - before)
"""


@pytest.mark.parametrize("megabytes", [16, pytest.param(100, marks=pytest.mark.slow)])
def test_a_long_file_takes_constant_memory(tmp_path, megabytes):
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, str(tmp_path), str(tmp_path / "x.ztok"), str(megabytes)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stderr[-2000:]
    size, more = map(int, result.stdout.split())
    assert size >= megabytes - 1 and more < 8


# Mistakes


def test_mistakes(tmp_path, coder):
    with pytest.raises(CodecError, match="documents: expected at least one, got none"):
        write_coded(tmp_path / "x.ztok", [], coder)
    with pytest.raises(CodecError, match="expected another part of the last one"):
        write_coded(tmp_path / "x.ztok", [(b"text", True)], coder)
    (tmp_path / "y").write_bytes(b"something else")
    with pytest.raises(ZFileError, match="y: expected a whole file of coded units"):
        CodedFile(tmp_path / "y", coder)
    write(tmp_path / "z", [b"text"], coder)
    data = bytearray((tmp_path / "z").read_bytes())
    data[2] ^= 16
    (tmp_path / "z").write_bytes(data)
    for call in (
        lambda path: stored_length(path, CODED_FORM),
        lambda path: CodedFile(path, coder),
        lambda path: read(path, coder),
    ):
        with pytest.raises(ZFileError, match="z: expected version 2 of coded units, got 3"):
            call(tmp_path / "z")
    with pytest.raises(ZFileError, match="version 2"):
        CodedFile.from_base(tmp_path / "z", coder.base)
