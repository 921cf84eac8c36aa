"""Files of learned units written and read as a stream: one document of many, parts, runs that are killed, damage."""

import io
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.codec.coded_files import altered, bounds_of, records_of, words
from tests.codec.conftest import shared_codec
from tests.codec.tiny_slots import tiny_slot_codec
from ztok_fast.cli.profile_machine import memory, reset_peak
from ztok_fast.codec import container, container_writer, learned_file, learned_writer
from ztok_fast.codec.config import ConfigError
from ztok_fast.codec.container import HEADER_BYTES, LEARNED_FORM
from ztok_fast.codec.container_file import stored_length
from ztok_fast.codec.container_writer import parts_of
from ztok_fast.codec.errors import (
    CodecError,
    ExactMismatchError,
    LossyTextWarning,
    ZBatchError,
    ZFileError,
)
from ztok_fast.codec.learned_file import LearnedFile, Reading, read_units
from ztok_fast.codec.learned_writer import write_learned

ROOT = Path(__file__).resolve().parents[2]
ERRORS = (ZFileError, ZBatchError, ExactMismatchError)
RATIO = 6


@pytest.fixture(scope="module")
def slots():
    return tiny_slot_codec()


@pytest.fixture(params=["slots", "pooled"])
def codec(request, slots):
    return slots if request.param == "slots" else shared_codec("llama")


@pytest.fixture
def short(monkeypatch):
    """Parts of 100 bytes and blocks of 150, so that a few short documents have many."""
    for module in (container, container_writer):
        monkeypatch.setattr(module, "PART_BYTES", 100)
    for module in (learned_file, learned_writer):
        monkeypatch.setattr(module, "BLOCK_BYTES", 150)


def documents(seed: int = 0, long: int = 0) -> list[bytes]:
    """Words, nothing, bytes that are no text; of ``long`` more words the first."""
    draw = random.Random(seed)
    return [words(draw, 1 + long), b"", b"a", b"\xff\xfe small \xc3", words(draw, 9), words(draw, 3)]


def write(path, texts, codec, exact=True, **options):
    parts = (part for text in texts for part in parts_of(io.BytesIO(text)))
    return write_learned(path, parts, codec, RATIO, exact, **options)


def read(path, codec) -> list[bytes]:
    found, going = [], False
    for block, goes_on in read_units(path, Reading.of(codec)):
        for text, going_on in zip(codec.decompress_bytes(block), goes_on):
            found.append((found.pop() if going else b"") + text)
            going = going_on
    return found


def test_a_stream_writes_what_is_saved_whole(codec, tmp_path, short):
    texts = documents()
    written = write(tmp_path / "x.ztok", texts, codec)
    z = codec.compress(texts, RATIO, exact=True)
    codec.save(z, tmp_path / "y.ztok")
    assert (tmp_path / "x.ztok").read_bytes() == (tmp_path / "y.ztok").read_bytes()
    assert (written.tokens, written.ztokens) == (z.tokens, z.ztokens)
    assert written.size == (tmp_path / "x.ztok").stat().st_size
    assert codec.load(tmp_path / "x.ztok") == z and read(tmp_path / "x.ztok", codec) == texts
    with pytest.warns(LossyTextWarning):
        write(tmp_path / "x.ztok", texts, codec, exact=False)
    with pytest.warns(LossyTextWarning):
        assert codec.load(tmp_path / "x.ztok") == codec.compress(texts, RATIO)


def test_any_document_is_read_without_the_others(codec, tmp_path, monkeypatch):
    texts = documents(1) * 3
    z = codec.compress(texts, RATIO, exact=True)
    write(tmp_path / "x.ztok", texts, codec)
    assert stored_length(tmp_path / "x.ztok", LEARNED_FORM) == (len(texts), sum(map(len, texts)))
    read_records = []
    inner = learned_file._read_record
    monkeypatch.setattr(learned_file, "_read_record", lambda *args: read_records.append(args[1]) or inner(*args))
    with LearnedFile(tmp_path / "x.ztok", codec) as file:
        assert (len(file), file.text_bytes) == (len(texts), sum(map(len, texts))) and not read_records
        for number in (4, -1, 0, 10):
            assert file[number] == z[number] and list(file.text(number)) == [texts[number]]
        assert read_records == [own for number in (4, 17, 0, 10) for own in (number, number)]
        with pytest.raises(IndexError, match="got 18"):
            file[18]


def test_long_documents_have_parts(codec, tmp_path, short):
    texts = documents(2, long=90)
    write(tmp_path / "x.ztok", texts, codec)
    assert len(records_of(tmp_path / "x.ztok")) > len(texts)
    assert read(tmp_path / "x.ztok", codec) == texts
    with LearnedFile(tmp_path / "x.ztok", codec) as file:
        assert [b"".join(file.text(number)) for number in reversed(range(len(texts)))] == texts[::-1]
        parts = list(file.parts(0))
        assert len(parts) > 2 and all(len(part) == 1 for part in parts)
        assert next(file.parts(4)) == file[4]  # between two parts of another
        with pytest.raises(ZFileError, match=r"document 0: expected documents of one part"):
            file[0]
    with pytest.raises(ZFileError, match="x.ztok: expected documents of one part"):
        codec.load(tmp_path / "x.ztok")


# Runs that are interrupted


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "lossy"])
def test_a_file_cut_anywhere_is_gone_on_from(codec, tmp_path, short, exact):
    texts, draw = [words(random.Random(4), 70), *(words(random.Random(n), 6) for n in range(9))], random.Random(5)
    target, partial, states = tmp_path / "x.ztok", tmp_path / "x.ztok.partial", []

    def watched():
        for text in texts:
            for part in parts_of(io.BytesIO(text)):
                if partial.exists():
                    states.append(partial.read_bytes())
                yield part

    write_learned(target, watched(), codec, RATIO, exact)
    whole, last = target.read_bytes(), states[-1]
    assert last[HEADER_BYTES:] == whole[HEADER_BYTES : len(last)] and last[:HEADER_BYTES] != whole[:HEADER_BYTES]
    compressed, compress = [], codec.compress
    codec.compress = lambda texts, *args, **options: compressed.extend(texts) or compress(texts, *args, **options)
    try:
        for state in [last, whole, b"", *(last[: draw.randrange(len(last))] for _ in range(4))]:
            partial.write_bytes(state)
            compressed.clear()
            counts: list[int] = []
            written = write(target, texts, codec, exact, progress=counts.append)
            assert target.read_bytes() == whole and not partial.exists()
            assert sum(counts) == sum(map(len, texts)) == written.resumed + sum(map(len, compressed))
            if state == last:
                assert 0 < len(b"".join(compressed)) <= 150 + 100  # the block in work and the one after it
    finally:
        del codec.compress


def test_what_other_texts_or_settings_left_is_not_gone_on_from(codec, tmp_path, short):
    texts = [words(random.Random(n), 6) for n in range(9)]
    target, partial = tmp_path / "x.ztok", tmp_path / "x.ztok.partial"
    other = [*texts[:5], texts[5][:-1] + b"?", *texts[6:]]

    def left_by(texts, exact, **settings) -> bytes:
        def interrupted():
            for text in [*texts, b"end"]:
                yield text, False
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_learned(target, interrupted(), codec, **({"ratio": RATIO, "exact": exact} | settings))
        assert not target.exists()
        return partial.read_bytes()

    for exact in (True, False):
        write(tmp_path / "whole.ztok", texts, codec, exact)
        for foreign in (left_by(other, exact), left_by(texts, exact, ratio=3), left_by(texts, not exact)):
            partial.write_bytes(foreign)
            write(target, texts, codec, exact)
            assert target.read_bytes() == (tmp_path / "whole.ztok").read_bytes()
            target.unlink()


SCRIPT = """
import sys, time
from tests.codec import test_learned_stream as own
def slowly(texts):
    for index, text in enumerate(texts):
        if index == 60:
            print("here", flush=True)
            time.sleep(60)  # the test kills this process here
        yield text, False
own.learned_writer.BLOCK_BYTES = 150
own.write_learned(sys.argv[1], slowly(own.short_documents()), own.tiny_slot_codec(), own.RATIO, True)
"""


def short_documents() -> list[bytes]:
    return [words(random.Random(n), 1 + n % 7) for n in range(80)]


def test_a_killed_run_is_gone_on_from(slots, tmp_path, monkeypatch):
    monkeypatch.setattr(learned_writer, "BLOCK_BYTES", 150)
    target = tmp_path / "x.ztok"
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(target)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=environment) as run:
        assert run.stdout.readline() == b"here\n"
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    kept = (tmp_path / "x.ztok.partial").read_bytes()
    write(tmp_path / "whole.ztok", short_documents(), slots)
    whole = (tmp_path / "whole.ztok").read_bytes()
    assert not target.exists() and kept[HEADER_BYTES:] == whole[HEADER_BYTES : len(kept)]
    assert write(target, short_documents(), slots).resumed > 40 and target.read_bytes() == whole


# Mistakes and damage


def test_mistakes_leave_nothing(codec, tmp_path):
    for parts, settings, error in (
        ([], {}, CodecError),
        ([(b"text", True)], {}, CodecError),
        ([(b"text", False)], {"ratio": 0.5}, ConfigError),
        ([(b"text", False)], {"levels": 99}, CodecError),
    ):
        with pytest.raises(error, match="expected"):
            write_learned(tmp_path / "x.ztok", parts, codec, **settings)
    assert os.listdir(tmp_path) == []


def test_lost_bytes_are_said_of_the_document(codec, tmp_path, short):
    texts = [b"text", words(random.Random(0), 40) + b"\xff", b"text", b"\xfe"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write(tmp_path / "x.ztok", texts, codec, exact=False)
    found = [own.message for own in caught if isinstance(own.message, LossyTextWarning)]
    assert [number for own in found for number in own.documents] == [1, 3]
    assert found[0].first_byte == len(texts[1]) - 1


@pytest.mark.parametrize("count", [80, pytest.param(3000, marks=pytest.mark.slow)])
def test_an_altered_file_is_an_error_or_the_exact_text(codec, tmp_path, short, count):
    path, files = tmp_path / "x.ztok", []
    for texts in (
        documents(3),
        documents(4, long=60),
        [words(random.Random(0), 5)],
        [words(random.Random(1), 2)] * 300,
    ):
        write(path, texts, codec, verify=False)
        files.append((path.read_bytes(), texts))
    records, right = [bounds_of(path, data) for data, _ in files], 0
    read(path, codec)
    for seed in range(count):
        draw = random.Random(seed)
        index = draw.choices(range(len(files)), (9, 9, 9, 1))[0]
        data, texts = files[index]
        changed = altered(draw, data, records[index], files[index - 1][0])
        path.write_bytes(changed)
        before = memory("VmRSS")
        reset_peak()
        try:
            assert read(path, codec) == texts, f"seed {seed}: another text"
            right += changed != data
        except ERRORS as error:
            assert "expected" in str(error) or "is not the original" in str(error), f"seed {seed}: {error}"
        peak = memory("VmHWM") - before
        assert peak <= 64 * len(changed) + MOST_BYTES, f"seed {seed}: {peak} bytes for a file of {len(changed)}"
        number = draw.randrange(len(texts))
        try:
            with LearnedFile(path, codec) as file:
                assert b"".join(file.text(number)) == texts[number], f"seed {seed}: another text"
        except (*ERRORS, IndexError) as error:
            assert "expected" in str(error) or "is not the original" in str(error), f"seed {seed}: {error}"
    assert right < count / 10


MOST_BYTES = 32 << 20
"""What a block may take, whatever the file."""
