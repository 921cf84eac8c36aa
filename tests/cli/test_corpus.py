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
    assert_mistake(tiny("compress", "--corpus", corpus, "-o", tmp_path / "z.ztok"), "ends in .parquet")
    assert_mistake(tiny("compress", "--corpus", corpus, "-o", corpus), "would be overwritten")
    assert_mistake(
        tiny("compress", "--corpus", tmp_path / "none.parquet", "-o", tmp_path / "z.parquet"), "no such file"
    )
    column = ("--text-column", "none", "-o", tmp_path / "z.parquet")
    assert_mistake(tiny("compress", "--corpus", corpus, *column), "expected a column 'none'")
    both = tiny("compress", corpus, "--corpus", corpus, "-o", tmp_path / "z.parquet")
    assert both.status == 2 and "not allowed with argument" in both.err
    assert not (tmp_path / "z.parquet").exists()
