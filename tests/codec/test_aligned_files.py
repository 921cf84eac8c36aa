"""Files of aligned coded units: every byte comes back, the windows are those of memory, and damage is an error."""

import random

import pytest

from tests.codec.coded_files import altered, bounds_of, documents, read, records_of, tiny_coder, words, write
from ztok_fast.codec import aligned_parts, coded_file, container, container_writer
from ztok_fast.codec.aligned_parts import AlignedPart, ZTokenSize, read_aligned
from ztok_fast.codec.coded import ALIGNED, LZMA, RAW
from ztok_fast.codec.coded_file import CodedFile, coder_for, stored_parts
from ztok_fast.codec.coded_units import UnitCoder, unit_coder_of
from ztok_fast.codec.container import RUN
from ztok_fast.codec.errors import CodecError, ZBatchError, ZFileError
from ztok_fast.codec.varint import varint

SIZE = ZTokenSize(3, 100)
"""No power of two, so that some numbers of its bits are no Z-token's."""


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    return tiny_coder(tmp_path_factory.mktemp("base"))


def texts_of_all_kinds() -> list[bytes]:
    return [*documents(40), words(random.Random(1), 90), b"a small text"]


def test_every_byte_comes_back(tmp_path, coder, monkeypatch):
    for module in (coded_file, container, container_writer):
        monkeypatch.setattr(module, "PART_BYTES", 200)
    texts = [*texts_of_all_kinds(), random.Random(2).randbytes(500)]
    aligned = coder.aligned(SIZE)
    assert write(tmp_path / "x.ztok", texts, aligned) <= sum(map(len, texts)) + 32 + 16 * len(texts)
    kinds = {head.kind for _, _, head in records_of(tmp_path / "x.ztok")}
    assert {ALIGNED, RAW, RUN} <= kinds <= {ALIGNED, RAW, LZMA, RUN}
    # Whoever reads the file need not know the size.
    for own in (coder, aligned, coder_for(tmp_path / "x.ztok", coder.base)):
        assert read(tmp_path / "x.ztok", own) == texts
    with CodedFile(tmp_path / "x.ztok", coder) as file:
        assert [file[number] for number in reversed(range(len(texts)))] == texts[::-1]


def test_a_file_has_the_windows_of_memory(tmp_path, coder):
    units = UnitCoder(coder, *SIZE)
    texts = [words(random.Random(number), 3 + 9 * number) for number in range(6)]
    for aligned in (True, False):
        z = units.compress(texts, aligned)
        assert units.save(z, tmp_path / "x.ztok") == (tmp_path / "x.ztok").stat().st_size
        own, is_aligned = unit_coder_of(tmp_path / "x.ztok", coder)
        assert is_aligned == aligned and (own.size == SIZE) == aligned
        loaded = units.load(tmp_path / "x.ztok")
        assert vars(loaded).keys() == vars(z).keys() and loaded.documents == z.documents
        for name in ("codes", "unit_lengths", "cu_segments", "cu_documents"):
            assert getattr(loaded, name).tolist() == getattr(z, name).tolist(), name
        count = 0
        for (head, payload), one in zip(stored_parts(tmp_path / "x.ztok"), z):
            if head.kind == ALIGNED:
                part, count = coder.read_aligned(payload, head.length), count + 1
                assert [number for own in part.windows for number in own] == units._numbers(one.codes)
                assert list(map(len, part.windows)) == one.cu_segments.diff().tolist() and part.tokens == one.tokens
        assert (count > 3) == aligned
    units.save(units.compress(texts, True), tmp_path / "x.ztok")
    with pytest.raises(ZFileError, match="x.ztok: expected Z-tokens of 2 codes from 1000, got 3 from 100"):
        UnitCoder(coder, 2, 1000).load(tmp_path / "x.ztok")


def test_what_no_units_can_be_is_said(tmp_path, coder):
    with pytest.raises(CodecError, match="expected Z-tokens of more values"):
        coder.aligned(ZTokenSize(1, 2))
    write(tmp_path / "x.ztok", [b"\xff" * 99], coder.aligned(SIZE))
    with pytest.raises(CodecError, match="expected text that the base model's tokens can represent"):
        UnitCoder(coder, *SIZE).load(tmp_path / "x.ztok")
    z = UnitCoder(coder, *SIZE).compress(["a text"], aligned=True)
    z.codes = z.codes.clone().fill_(99)
    with pytest.raises((ZBatchError, ValueError), match="expected|original"):
        UnitCoder(coder, *SIZE).save(z, tmp_path / "y.ztok")
    assert not (tmp_path / "y.ztok").exists()


@pytest.mark.parametrize("bits", [1, 7, 8, 44, 63])
def test_numbers_are_packed_lowest_bit_first(bits):
    draw = random.Random(bits)
    numbers = [draw.randrange(1 << bits) for _ in range(50)]
    packed = aligned_parts._pack(numbers, bits)
    whole = sum(number << index * bits for index, number in enumerate(numbers))
    assert packed == whole.to_bytes(-(-50 * bits // 8), "little")
    assert aligned_parts._unpack(packed, bits, 50) == numbers


def test_each_kind_of_damage_has_its_message(coder):
    part = AlignedPart(SIZE, 20, [[5, 7], [9]])
    data, vocabulary = part.to_bytes(), coder.engine.settings.vocabulary
    assert read_aligned(data, 20, 16, vocabulary) == part
    head = varint(3) + varint(100)
    for changed, message in (
        (b"", "number: expected more bytes"),
        (varint(64) + data[1:], "of more values than"),
        (varint(1) + data[1:], "of more values than"),
        (varint(3) + varint(1 << 40) + data[2:], "of more values than"),
        (head + varint(21) + data[3:], "expected 1 to 20 tokens, got 21"),
        (head + varint(0) + data[3:], "expected 1 to 20 tokens, got 0"),
        (head + varint(20) + varint(17) + data[4:], "expected 1 to 16 windows of a segment, got 17"),
        (head + varint(20) + varint(2) + varint(0) + data[5:], "expected 1 to 4 windows of a segment, got 0"),
        (data + b"\0", "expected 3 windows, got 9 bytes"),
        (data[:-1], "expected 3 windows, got 7 bytes"),
    ):
        with pytest.raises(ZFileError, match=message):
            read_aligned(changed, 20, 16, vocabulary)


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_an_altered_file_is_an_error_or_the_same(tmp_path, coder, count):
    path, files, right = tmp_path / "x.ztok", [], 0
    for texts in ([words(random.Random(0), 40)], [words(random.Random(n), 12) for n in range(5)], documents(300)):
        write(path, texts, coder.aligned(SIZE), verify=False)
        files.append((path.read_bytes(), texts))
    records = [bounds_of(path, data) for data, _ in files]
    for seed in range(count):
        draw = random.Random(seed)
        index = draw.choices(range(3), (8, 8, 1))[0]
        data, texts = files[index]
        changed = altered(draw, data, records[index], files[index - 1][0])
        path.write_bytes(changed)
        try:
            assert read(path, coder) == texts, f"seed {seed}: another text"
            right += changed != data
        except ZFileError as error:
            assert str(path) in str(error), f"seed {seed}: {error}"
    assert right < count / 10
