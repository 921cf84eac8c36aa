import sys
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.codec.documents import batches, example
from ztok_fast.codec.corpus import compress_corpus, read_corpus, write_corpus
from ztok_fast.codec.errors import ZBatchError, ZFileError
from ztok_fast.codec.zbatch import ZBatch

IDS = ["plain", "empty", "corrected", "raw"]


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        write_corpus(tmp_path / "c.parquet", [])
    with pytest.raises(ImportError, match="pip install pyarrow"):
        next(read_corpus(tmp_path / "c.parquet"))


@pytest.fixture
def parquet():
    return pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def corpus(parquet, tmp_path):
    path = tmp_path / "corpus.parquet"
    assert write_corpus(path, zip(IDS, example())) == 4
    return path


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches(), group=st.integers(1, 3))
def test_documents_survive_a_corpus(parquet, tmp_path_factory, batch, group):
    path = tmp_path_factory.mktemp("corpus") / "c.parquet"
    if not len(batch):
        return
    rows = [(f"id {index}", one) for index, one in enumerate(batch)]
    assert write_corpus(path, rows, rows_per_group=group) == len(rows)
    assert list(read_corpus(path, rows_at_once=2)) == rows


def test_another_tool_reads_ids_and_codes(corpus, parquet):
    table = parquet.read_table(corpus)
    assert table["id"].to_pylist() == IDS
    assert table["codes"].to_pylist() == [[1, 15, 0, 2, 7, 7], [], [9, 0], [5, 6]]
    assert table["unit_lengths"].to_pylist()[2] == [4, 3]
    assert table["segment_rows"].to_pylist()[0] == [2, 0, 1]
    assert table.schema.metadata[b"codec_fingerprint"].decode() == example().codec_fingerprint


def test_rows_of_a_corpus_join_into_the_batch(corpus):
    assert ZBatch.concatenate([one for _, one in read_corpus(corpus)]) == example()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda b: [], "expected at least one"),
        (lambda b: [("x", b)], "expected a batch of one document, got 4"),
        (lambda b: [(7, b[0])], "id: expected a string"),
        (lambda b: [("x", b[0]), ("y", replace(b[0], codec_fingerprint="0" * 64))], "codec: expected the one"),
        (lambda b: [("x", b[0]), ("y", replace(b[0], codebook_size=99))], "codebook_size 16, got 99"),
        (lambda b: [("x", replace(b[0], codebook_size=2))], "codes: expected"),
        (lambda b: [("x", replace(b[0], codebook_size=70_000))], "at most 65536"),
    ],
    ids=["none", "several documents", "id", "codec", "codebook", "invalid", "wide codes"],
)
def test_bad_rows_are_refused_and_nothing_is_written(parquet, tmp_path, rows, message):
    with pytest.raises(ZBatchError, match=message):
        write_corpus(tmp_path / "c.parquet", rows(example()))
    assert list(tmp_path.iterdir()) == []


def test_missing_truncated_and_foreign_files_are_refused(corpus, parquet, tmp_path):
    import pyarrow

    with pytest.raises(ZFileError, match="expected an existing Parquet file"):
        next(read_corpus(tmp_path / "nowhere.parquet"))
    data = corpus.read_bytes()
    corpus.write_bytes(data[: len(data) // 2])
    with pytest.raises(ZFileError, match="not a whole Parquet file"):
        next(read_corpus(corpus))
    parquet.write_table(pyarrow.table({"id": ["x"]}), corpus)
    with pytest.raises(ZFileError, match="expected a compressed corpus of format version 2, got format None"):
        next(read_corpus(corpus))


def alter(parquet, path, **columns):
    import pyarrow

    table = parquet.read_table(path)
    for name, values in columns.items():
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pyarrow.array(values, field.type))
    parquet.write_table(table, path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tokens": [12, 0, 8, 2]}, "row 2: document 0: unit_lengths: expected to cover its 8"),
        ({"levels": [2, 2, 9, 2]}, "row 2: expected 2 Z-tokens of 1 to 2 levels"),
        ({"levels": [2, 2, 2, 2]}, "row 2: expected 2 Z-tokens"),
        ({"digest": ["0", None, None, None]}, "row 0: document 0: digest: expected one with"),
        ({"codes": [[1, 15, 0, 2, 7, 16], [], [9, 0], [5, 6]]}, "row 0: document 0: codes: expected 0 to 15"),
        ({"segment_rows": [[2, 0, 2], [], [2], [1]]}, "row 0: cu_segments: expected offsets from 0 to the 3"),
        (
            {"digest": [None] * 4, "corrections": [None, None, {"positions": [1], "tokens": None}, None]},
            "row 2: corrections: expected lists",
        ),
        (
            {
                "digest": [None] * 4,
                "corrections": [None, None, {"positions": [], "tokens": [], "patch": {"start": 1}}, None],
            },
            "row 2: corrections.patch: expected start, end and bytes",
        ),
    ],
)
def test_tampered_rows_are_named(corpus, parquet, columns, message):
    alter(parquet, corpus, **columns)
    with pytest.raises(ZFileError, match=message):
        list(read_corpus(corpus))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": "1"}, "got format 'ztok-corpus', version '1'"),
        ({"num_codebooks": "x"}, "metadata num_codebooks: expected a decimal"),
        ({"num_codebooks": "999999"}, "num_codebooks: expected 1 to 256"),
        ({"codec_fingerprint": "x"}, "codec_fingerprint: expected 64"),
    ],
)
def test_tampered_settings_are_refused(corpus, parquet, metadata, message):
    table = parquet.read_table(corpus)
    known = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    parquet.write_table(table.replace_schema_metadata(known | metadata), corpus)
    with pytest.raises(ZFileError, match=message):
        list(read_corpus(corpus))


def test_other_columns_are_refused(corpus, parquet):
    table = parquet.read_table(corpus)
    parquet.write_table(table.drop_columns(["unit_lengths"]), corpus)
    with pytest.raises(ZFileError, match="expected the columns"):
        list(read_corpus(corpus))


TEXTS = ["A small text to compress; " * 4, "", "x", "Small texts learn merges: 東京 🙂.", "the end"]


@pytest.fixture
def texts(parquet, tmp_path):
    """Writes a Parquet file of the columns given."""
    import pyarrow

    def write(**columns):
        path = tmp_path / "texts.parquet"
        parquet.write_table(pyarrow.table(columns), path)
        return path

    return write


@pytest.mark.parametrize("rows_at_once", [1, 2, 64])
def test_a_corpus_of_texts_is_compressed_row_by_row(codec, texts, tmp_path, rows_at_once):
    source, target = texts(id=list("abcde"), text=TEXTS, other=[0] * 5), tmp_path / "z.parquet"
    seen = []
    totals = compress_corpus(codec, source, target, 2, exact=True, rows_at_once=rows_at_once, progress=seen.append)
    rows = list(read_corpus(target))
    assert [identifier for identifier, _ in rows] == list("abcde")
    assert [codec.decompress(z)[0] for _, z in rows] == TEXTS
    expected = codec.compress(TEXTS, 2)
    assert totals == (5, expected.tokens, expected.ztokens) and sum(seen) == 2 * expected.tokens
    assert [z.ztokens for _, z in rows] == expected.cu_ztokens.diff().tolist()


def test_rows_without_identifiers_are_numbered_and_columns_can_be_named(codec, texts, tmp_path):
    source, target = texts(body=TEXTS[:3]), tmp_path / "z.parquet"
    compress_corpus(codec, source, target, text_column="body", rows_at_once=2)
    assert [identifier for identifier, _ in read_corpus(target)] == ["0", "1", "2"]
    numbered = texts(body=TEXTS[:2], key=[7, 9])
    compress_corpus(codec, numbered, target, text_column="body", id_column="key", levels=1)
    assert [(identifier, z.documents[0].levels) for identifier, z in read_corpus(target)] == [("7", 1), ("9", 1)]


def test_sources_that_cannot_be_read_are_refused_and_leave_nothing(codec, texts, tmp_path):
    target = tmp_path / "z.parquet"
    with pytest.raises(ZFileError, match="expected an existing Parquet file"):
        compress_corpus(codec, tmp_path / "none.parquet", target)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ZFileError, match="not a whole Parquet file"):
        compress_corpus(codec, tmp_path / "broken.parquet", target)
    with pytest.raises(ZFileError, match="expected a column 'text' with the texts, got"):
        compress_corpus(codec, texts(body=TEXTS), target)
    with pytest.raises(ZFileError, match="row 3: text: expected a string, got None"):
        compress_corpus(codec, texts(text=[*TEXTS[:3], None]), target, rows_at_once=2)
    with pytest.raises(ZFileError, match="rows_at_once: expected at least 1"):
        compress_corpus(codec, texts(text=TEXTS), target, rows_at_once=0)
    with pytest.raises(ZBatchError, match="expected at least one"):
        compress_corpus(codec, texts(text=["a"][:0]), target)
    assert not target.exists() and not list(tmp_path.glob(".ztok-*"))
