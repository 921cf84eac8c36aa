"""``ztok compress --corpus``: a Parquet file of texts to a Parquet file of codes."""

import pytest

from tests.cli.conftest import TEXT, assert_mistake
from ztok_fast.codec.corpus import read_corpus


@pytest.fixture
def corpus(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "docs.parquet"
    parquet.write_table(pyarrow.table({"id": ["one", "two"], "text": [TEXT, "a"], "body": ["b", TEXT]}), path)
    return path


def test_a_corpus_becomes_codes(tiny, corpus, tmp_path):
    target = tmp_path / "z.parquet"
    result = tiny("compress", "--corpus", corpus, "-o", target, "--ratio", "2")
    assert result.status == 0 and result.err == ""
    rows = dict(read_corpus(target))
    tokens, ztokens = sum(z.tokens for z in rows.values()), sum(z.ztokens for z in rows.values())
    assert list(rows) == ["one", "two"]
    assert f"{target}: 2 documents, {tokens} tokens -> {ztokens} Z-tokens, ratio {tokens / ztokens:.2f}" in result.out
    assert tiny("compress", "--corpus", corpus, "-o", target, "--text-column", "body", "--exact").status == 0
    assert [z.documents[0].byte_length for _, z in read_corpus(target)] == [1, len(TEXT.encode())]


def test_what_cannot_be_done_is_said(tiny, corpus, tmp_path):
    assert_mistake(tiny("compress", "--corpus", corpus), "-o: expected a file name ending in .parquet")
    assert_mistake(tiny("compress", "--corpus", corpus, "-o", tmp_path / "z.txt"), "ends in .parquet")
    assert_mistake(tiny("compress", "--corpus", corpus, "-o", corpus), "would be overwritten")
    assert_mistake(
        tiny("compress", "--corpus", tmp_path / "none.parquet", "-o", tmp_path / "z.parquet"), "no such file"
    )
    column = ("--text-column", "none", "-o", tmp_path / "z.parquet")
    assert_mistake(tiny("compress", "--corpus", corpus, *column), "expected a column 'none'")
    both = tiny("compress", corpus, "--corpus", corpus, "-o", tmp_path / "z.parquet")
    assert both.status == 2 and "not allowed with argument" in both.err
    assert not (tmp_path / "z.parquet").exists()


def rows_of(path):
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()


def test_a_corpus_of_z_tokens_comes_back(tiny, corpus, tmp_path):
    z, back = tmp_path / "z.parquet", tmp_path / "back.parquet"
    assert tiny("compress", "--corpus", corpus, "-o", z, "--exact").status == 0
    assert tiny("decompress", z, "-o", back).status == 0
    assert rows_of(back) == [{"id": "one", "text": TEXT}, {"id": "two", "text": "a"}]
    assert tiny("decompress", z, "--document", 1).bytes == b"a"


def test_a_corpus_becomes_the_documents_of_one_file(tiny, corpus, tmp_path):
    z = tmp_path / "z.ztok"
    result = tiny("compress", "--corpus", corpus, "-o", z, "--exact")
    assert result.status == 0 and f"{len(TEXT.encode()) + 1} bytes -> {z.stat().st_size}, " in result.out
    assert tiny("decompress", z).bytes == TEXT.encode() + b"a"
    assert tiny("decompress", z, "--document", 1).bytes == b"a"
    column = ("--text-column", "none", "-o", tmp_path / "y.ztok")
    assert_mistake(tiny("compress", "--corpus", corpus, *column), "expected a column 'none'")
    assert not list(tmp_path.glob("y.ztok*"))


@pytest.mark.parametrize("suffix", [".parquet", ".ztok"])
def test_a_corpus_of_coded_units_comes_back(ztok, corpus, tmp_path, suffix):
    z, size = tmp_path / f"z{suffix}", len(TEXT.encode()) + 1
    result = ztok("compress", "--corpus", corpus, "--units", "coded", "--context", 64, "-o", z)
    assert result.status == 0 and f"{z}: {size} bytes -> {z.stat().st_size:,}, " in result.out
    assert ztok("decompress", z).bytes == TEXT.encode() + b"a"
    assert ztok("decompress", z, "--document", 1).bytes == b"a"
    assert ztok("decompress", z, "--document", 0, "-o", tmp_path / "0.txt").status == 0
    assert (tmp_path / "0.txt").read_bytes() == TEXT.encode()
    assert_mistake(ztok("decompress", z, "--document", 2), "--document: expected")
    if suffix == ".parquet":
        back = tmp_path / "back.parquet"
        assert f"{back}: {size} bytes from {z}" in ztok("decompress", z, "-o", back).out
        assert rows_of(back) == [{"id": "one", "text": TEXT}, {"id": "two", "text": "a"}]
        assert_mistake(ztok("decompress", z, "-o", tmp_path / "out"), "ends in .parquet")
        assert_mistake(ztok("decompress", z, "--engine", "float32"), "row 0", "in float32")


def test_a_corpus_of_coded_units_needs_a_name(ztok, corpus, tmp_path):
    coded = ("compress", "--corpus", corpus, "--units", "coded")
    assert_mistake(ztok(*coded), "-o: expected a file name ending in .parquet or .ztok")
    assert_mistake(ztok(*coded, "-o", tmp_path / "z.txt"), "ends in .ztok")
    assert_mistake(ztok(*coded, "-o", tmp_path / "z.ztok", "--text-column", "none"), "expected a column 'none'")
