"""Coded units in Parquet: every text comes back, row by row, and damage is said."""

import random

import pytest

from tests.codec.coded_files import documents, tiny_coder, words
from ztok_fast.codec import container, container_writer
from ztok_fast.codec.coded_corpus import (
    CodedBatches,
    batches,
    compress_coded_corpus,
    is_coded_corpus,
    read_coded_corpus,
)
from ztok_fast.codec.coded_file import texts_of
from ztok_fast.codec.coded_writer import coded_bytes, write_coded
from ztok_fast.codec.errors import CodecError, ZFileError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    return tiny_coder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def texts():
    draw = random.Random(0)
    return [words(draw, draw.randrange(30)).decode() for _ in range(70)] + ["", "é" * 300]


@pytest.fixture
def source(tmp_path, texts):
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "docs.parquet")
    return tmp_path / "docs.parquet"


def wrong_hash(file: bytes) -> bytes:
    at = container.HEADER_BYTES + 4
    return file[:at] + bytes([file[at] ^ 1]) + file[at + 1 :]


def test_every_text_comes_back(tmp_path, coder, source, texts):
    target, counts = tmp_path / "z.parquet", []
    totals = compress_coded_corpus(coder, source, target, text_column="body", progress=counts.append)
    size = sum(len(text.encode()) for text in texts)
    assert (totals.documents, totals.text) == (len(texts), size) and sum(counts) == size
    assert is_coded_corpus(target) and not is_coded_corpus(source)
    counts.clear()
    found = list(read_coded_corpus(target, coder.base, progress=counts.append))
    assert found == [(str(number), text.encode()) for number, text in enumerate(texts)] and sum(counts) == size
    table = parquet.read_table(target)
    assert table.column_names == ["id", "bytes", "coded"]
    cells = table["coded"].to_pylist()
    assert sum(map(len, cells)) == totals.coded
    # A cell is what a file of that text is.
    write_coded(tmp_path / "x.ztok", [(texts[3].encode(), False)], coder)
    assert (tmp_path / "x.ztok").read_bytes() == cells[3]


def test_files_in_memory_of_any_length(coder, monkeypatch):
    for module in (container, container_writer):
        monkeypatch.setattr(module, "PART_BYTES", 100)
    own = [*documents(30), random.Random(1).randbytes(350), words(random.Random(2), 90)]
    files = coded_bytes(own, coder)
    assert texts_of(files, coder) == own and texts_of([], coder) == [] == coded_bytes([], coder)
    for damaged in (wrong_hash(files[3]), files[-1] + b"\0", files[-2][:-5], b"", files[0][:11]):
        with pytest.raises(ZFileError, match="file 1: "):
            texts_of([files[0], damaged], coder)


def test_batches_of_rows_as_ray_data_hands_them(coder, texts):
    settings = {"base": coder.base.name, "context": 16, "rows": 8}
    packed = CodedBatches(text_column="body", **settings)({"body": texts, "n": list(range(len(texts)))})
    assert list(packed) == ["n", "bytes", "coded"]
    back = CodedBatches(decode=True, text_column="body", **settings)(packed)
    assert back == {"n": list(range(len(texts))), "body": texts}
    with pytest.raises(CodecError, match="expected a column 'coded'"):
        CodedBatches(decode=True, **settings)({"text": texts})


def test_stretches_of_rows():
    assert list(batches([5, 5, 20, 1, 0], 10)) == [(0, 2), (2, 3), (3, 5)]
    assert list(batches([], 10)) == []


def test_damage_is_said(tmp_path, coder, source):
    target = tmp_path / "z.parquet"
    compress_coded_corpus(coder, source, target, text_column="body")
    table = parquet.read_table(target)
    cells = table["coded"].to_pylist()
    for number, cell, message in (
        (5, wrong_hash(cells[5]), "file 5"),
        (0, b"no file", "row 0: expected a whole file of coded"),
    ):
        changed = [*cells[:number], cell, *cells[number + 1 :]]
        column = pyarrow.array(changed, pyarrow.large_binary())
        parquet.write_table(table.set_column(2, table.schema.field(2), column), target)
        with pytest.raises(ZFileError, match=message):
            list(read_coded_corpus(target, coder.base))
    with pytest.raises(ZFileError, match="expected a corpus of coded units"):
        list(read_coded_corpus(source, coder.base))
    with pytest.raises(ZFileError, match="expected an existing Parquet file"):
        list(read_coded_corpus(tmp_path / "none", coder.base))
    (tmp_path / "x").write_bytes(b"PAR1 and more")
    with pytest.raises(ZFileError, match="not a whole Parquet file"):
        is_coded_corpus(tmp_path / "x")
