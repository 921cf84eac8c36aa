"""Coded units: exact, small, the same anywhere; files that are damaged are errors and never another text."""

import io
import random
from pathlib import Path

import pytest
import torch

from ztok_fast.cli.profile_files import general_compressors
from ztok_fast.codec import coded, coded_file, container_writer
from ztok_fast.codec.base_model import load_base
from ztok_fast.codec.coded import CODED, DEFAULT_BASE, LZMA, RAW, TextCoder
from ztok_fast.codec.coded_file import coder_for, read_coded
from ztok_fast.codec.coded_writer import coded_bytes, write_coded
from ztok_fast.codec.container import CODED_FORM, form_of
from ztok_fast.codec.container_file import stored_length
from ztok_fast.codec.container_writer import parts_of
from ztok_fast.codec.errors import CodecError, ZFileError
from ztok_fast.codec.varint import read_varint, varint

PROSE = (
    "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals, when it was checked by "
    "a violent gust of wind which swept up the streets, rattling along the house-tops."
)
DOCUMENTS = [
    PROSE.encode(),
    b"",
    b"a",
    "naïve café 東京 🙂\r\n\t<|endoftext|> \x00 end".encode(),
    b"\xff\xfe\x80 not text \xc3",
    bytes(range(256)) * 3,
    (PROSE * 9).encode(),
    b"abc" * 5000,
]


@pytest.fixture(scope="module")
def base():
    return load_base(str(DEFAULT_BASE))


@pytest.fixture(scope="module")
def coder(base):
    return TextCoder(base, context=64, rows=5)


def as_file(path, documents, coder, **options):
    parts = [part for document in documents for part in parts_of(io.BytesIO(document))]
    return write_coded(path, parts, coder, **options)


def from_file(path, coder):
    documents, going = [], False
    for text, goes_on in read_coded(path, coder):
        documents.append((documents.pop() if going else b"") + text)
        going = goes_on
    return documents


def test_every_byte_comes_back(tmp_path, coder):
    size = as_file(tmp_path / "x.ztok", DOCUMENTS, coder)
    assert size == (tmp_path / "x.ztok").stat().st_size
    assert from_file(tmp_path / "x.ztok", coder) == DOCUMENTS
    assert stored_length(tmp_path / "x.ztok", CODED_FORM) == (len(DOCUMENTS), sum(map(len, DOCUMENTS)))
    assert form_of(tmp_path / "x.ztok") is CODED_FORM


def test_prose_takes_less_than_a_third_and_nothing_grows(tmp_path, coder):
    parts = coder.encode(DOCUMENTS)
    assert [p.mode for p in parts][0] == CODED and parts[7].mode == LZMA and parts[4].mode == RAW
    assert len(parts[0].payload) < len(DOCUMENTS[0]) / 3
    noise = random.Random(0).randbytes(3000)
    assert as_file(tmp_path / "noise.ztok", [noise], coder) <= len(noise) + 32
    assert as_file(tmp_path / "more.ztok", [noise] * 3, coder) <= 3 * len(noise) + 32 + 2 * 16
    assert as_file(tmp_path / "short.ztok", [PROSE.encode()[:99]], coder) <= 60


def test_prose_is_smaller_than_what_general_compressors_make(base):
    """Prose of 300 characters and more, nothing of it in the base's training text; whole files."""
    text = (Path(__file__).parents[1] / "data" / "unseen.txt").read_bytes()
    own = TextCoder(base)
    cuts = [text[:size] for size in (300, 1000, len(text))]
    for cut, file in zip(cuts, coded_bytes(cuts, own, verify=False)):
        for label, (compress, _) in general_compressors().items():
            assert len(file) < len(compress(cut)), (label, len(cut), len(file))


def test_segments_side_by_side_do_not_change_a_bit(base, coder):
    one = TextCoder(base, context=64, rows=1)
    assert one.identity == coder.identity
    parts = coder.encode(DOCUMENTS)
    assert one.encode(DOCUMENTS) == parts
    assert one.decode(parts, [len(d) for d in DOCUMENTS]) == DOCUMENTS


def test_a_segment_longer_than_the_window_is_read_in_windows(tmp_path, base):
    text = (PROSE * 2 + "The end.").encode()
    sliding = TextCoder(base, context=128, rows=3, window=16)
    [part] = sliding.encode([text])
    assert part.mode == CODED
    assert sliding.decode([part], [len(text)]) == [text]
    one = TextCoder(base, context=128, rows=1, window=16)
    assert one.encode([text]) == [part] and one.decode([part], [len(text)]) == [text]
    # What is read again helps: segments of one window each take more, one window for all takes less.
    blind, whole = (TextCoder(base, context=n, rows=8).encode([text])[0] for n in (16, 128))
    assert len(whole.payload) < len(part.payload) < 0.95 * len(blind.payload)
    assert len({c.identity for c in (sliding, TextCoder(base, context=128), TextCoder(base, context=16))}) == 3
    as_file(tmp_path / "x.ztok", [text], sliding)
    found = coder_for(tmp_path / "x.ztok", base)
    assert (found.context, found.window) == (128, 16)
    assert from_file(tmp_path / "x.ztok", found) == [text]


def test_a_window_of_no_use_changes_nothing(base):
    assert TextCoder(base, context=32, window=32).identity == TextCoder(base, context=32, window=64).identity


def test_instruction_sets_read_each_other(coder):
    before, text = torch.ops.ztok.isa_native(-1), [PROSE.encode()[:60]]
    try:
        torch.ops.ztok.isa_native(0)
        slow = coder.encode(text)
    finally:
        torch.ops.ztok.isa_native(before)
    assert slow == coder.encode(text) and slow[0].mode == CODED
    assert coder.decode(slow, [60]) == text


def test_damage_is_an_error_or_changes_nothing(tmp_path, coder):
    path, bad = tmp_path / "x.ztok", tmp_path / "bad.ztok"
    documents = [PROSE.encode(), b"\xff\xfe raw", b"abc" * 50]
    as_file(path, documents, coder)
    whole, draw = path.read_bytes(), random.Random(1)
    for _ in range(60):
        data = bytearray(whole)
        kind = draw.randrange(3)
        if kind == 0:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[draw.randrange(len(data)) :]
        else:
            at = draw.randrange(len(data))
            data[at : at + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
        bad.write_bytes(data)
        try:
            found = from_file(bad, coder)
        except ZFileError as error:
            assert str(bad) in str(error)
        else:
            assert found == documents


def test_an_interrupted_run_is_gone_on_from(tmp_path, coder, monkeypatch):
    monkeypatch.setattr(coded_file, "BLOCK_BYTES", 300)
    as_file(tmp_path / "whole.ztok", DOCUMENTS, coder)
    whole = (tmp_path / "whole.ztok").read_bytes()
    partial = tmp_path / "x.ztok.partial"
    for kept in (3, 11, len(whole) // 2, len(whole) - 1):
        partial.write_bytes(whole[:kept])
        as_file(tmp_path / "x.ztok", DOCUMENTS, coder)
        assert (tmp_path / "x.ztok").read_bytes() == whole and not partial.exists()
    partial.write_bytes(whole)  # of other texts
    as_file(tmp_path / "x.ztok", DOCUMENTS[::-1], coder)
    assert from_file(tmp_path / "x.ztok", coder) == DOCUMENTS[::-1]


def test_another_coder_is_refused(tmp_path, base, coder):
    as_file(tmp_path / "x.ztok", [b"text"], coder)
    with pytest.raises(ZFileError, match="expected a file of coder"):
        list(read_coded(tmp_path / "x.ztok", TextCoder(base, context=32, rows=2)))
    with pytest.raises(ZFileError, match="in float32, got one of another base model or precision"):
        coder_for(tmp_path / "x.ztok", base, "float32")


def test_a_file_says_how_it_is_read(tmp_path, base):
    for precision, context in (("int8", 32), ("float32", 1)):
        as_file(tmp_path / "x.ztok", [PROSE.encode()], TextCoder(base, precision, context, rows=3))
        found = coder_for(tmp_path / "x.ztok", base)
        assert (found.engine.precision, found.context) == (precision, context)
        assert from_file(tmp_path / "x.ztok", found) == [PROSE.encode()]


def test_many_empty_documents(tmp_path, coder):
    as_file(tmp_path / "x.ztok", [b""] * 9000, coder)
    assert from_file(tmp_path / "x.ztok", coder) == [b""] * 9000


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000])
def test_parts_cut_between_characters(monkeypatch, size):
    monkeypatch.setattr(container_writer, "PART_BYTES", 100)
    for text in (("é" * size).encode(), ("x東" * size).encode(), b"\x80" * size, b"a" * size):
        parts = list(parts_of(io.BytesIO(text)))
        assert b"".join(part for part, _ in parts) == text
        assert [goes_on for _, goes_on in parts] == [True] * (len(parts) - 1) + [False]
        assert all(len(part) <= 100 for part, _ in parts)
        if text[:1] not in (b"\x80", b""):
            assert all(part.decode() is not None for part, _ in parts)


def test_verification_stores_a_part_otherwise(tmp_path, coder, monkeypatch):
    monkeypatch.setattr(coded.TextCoder, "decode", lambda self, parts, lengths, progress=None: [b"other"] * len(parts))
    with pytest.warns(UserWarning, match="did not come back"):
        as_file(tmp_path / "x.ztok", [PROSE.encode()], coder)
    monkeypatch.undo()
    assert from_file(tmp_path / "x.ztok", coder) == [PROSE.encode()]


def test_numbers():
    for value in (0, 127, 128, 300, 2**20, 2**62):
        assert read_varint(varint(value) + b"x", 0) == (value, len(varint(value)))
    with pytest.raises(ZFileError, match="truncated"):
        read_varint(b"\x80", 0)
    with pytest.raises(ZFileError, match="at most 9 bytes"):
        read_varint(b"\x80" * 10, 0)


def test_mistakes(base):
    with pytest.raises(CodecError, match="context: expected an integer from 1"):
        TextCoder(base, context=0)
    with pytest.raises(CodecError, match="context: expected a power of two, got 48"):
        TextCoder(base, context=48)
    with pytest.raises(CodecError, match="window: expected a power of two, got 3"):
        TextCoder(base, window=3)
    with pytest.raises(CodecError, match="rows: expected an integer from 1"):
        TextCoder(base, rows=True)
