"""The stream of training batches: deterministic, resumable, without what is excluded, disjoint between processes."""

import gzip
import json

import pytest

from tests.codec.tiny_base import tiny_tokenizer
from tests.train.tiny_run import write_corpus
from ztok_fast.train.batches import Section, SectionStream, make_batch
from ztok_fast.train.text_data import DataError, iter_rows, iter_texts

TOKENIZER = tiny_tokenizer()


def stream_of(*files, **settings):
    values = {"segment_length": 16, "section_tokens": 40, "batch_tokens": 90, "seed": 1, "buffer_sections": 8}
    return SectionStream([str(f) for f in files], TOKENIZER, **(values | settings))


def sections_of(stream, batches):
    return [(c.tokens, c.question, c.answer) for _ in range(batches) for c in stream.next_batch().sections]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "train.jsonl", rows=12)


def test_same_seed_same_batches_and_another_seed_others(corpus):
    one, two, other = (sections_of(stream_of(corpus, seed=s), 6) for s in (1, 1, 2))
    assert one == two != other


@pytest.mark.parametrize("taken", [0, 1, 9, 30])
def test_a_stream_goes_on_from_its_state(corpus, taken):
    whole = stream_of(corpus)
    sections_of(whole, taken)
    state = whole.state()
    resumed = stream_of(corpus, seed=99)
    resumed.load_state(json.loads(json.dumps(state)))  # a state survives being written to a file
    assert sections_of(whole, 12) == sections_of(resumed, 12)
    assert whole.rows_read == resumed.rows_read


def test_whole_passes_are_not_read_again_on_resuming(corpus, monkeypatch):
    from ztok_fast.train import batches

    stream = stream_of(corpus)
    sections_of(stream, 60)
    assert stream.rows_read > 48
    read = []
    monkeypatch.setattr(batches, "iter_rows", lambda path: (read.append(1) or row for row in iter_rows(path)))
    resumed = stream_of(corpus)
    resumed.load_state(stream.state())
    expected = sections_of(stream, 1)
    read.clear()
    assert sections_of(resumed, 1) == expected
    assert len(read) < 36, "a pass to count the rows and a part of another"


def test_batches_hold_the_text_in_order(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abcdefghij" * 10}])
    ids = TOKENIZER("abcdefghij" * 10)["input_ids"]
    sections = stream_of(path).sections_of(next(iter_rows(path)))
    assert [t for c in sections for t in c.tokens] == ids and [len(c.tokens) for c in sections] == [
        40,
        40,
        len(ids) - 80,
    ]
    batch = make_batch(sections, 16)
    assert batch.tokens.tolist() == ids
    assert batch.cu_segments.diff().tolist() == [16, 16, 8, 16, 16, 8, 16, 4]
    assert batch.cu_sections.tolist() == [0, 3, 6, 8]


def test_batches_are_as_large_as_asked(corpus):
    stream = stream_of(corpus)
    for _ in range(20):
        batch = stream.next_batch()
        sizes = [len(c.tokens) for c in batch.sections]
        assert sum(sizes) == len(batch.tokens) >= 90 > sum(sizes[:-1])
        assert all(16 <= n <= 40 for n in sizes)


def test_questions_go_with_text_that_fits_one_section(tmp_path):
    rows = [
        {"text": "a short text, one section", "question": "q?", "answer": "a!"},
        {"text": "long " * 30, "question": "q?", "answer": "a!"},
        {
            "text": "another short text here",
            "qa": [{"question": "1?", "answer": "one"}, {"question": "2?", "answer": "two"}, "x"],
        },
        {"text": "a text without an answer", "question": "q?", "answer": ""},
    ]
    stream = stream_of(write_rows(tmp_path / "a.jsonl", rows))
    encode = lambda text: TOKENIZER(text)["input_ids"]  # noqa: E731
    one, cut, several, none = (stream.sections_of(row) for row in rows)
    assert [(c.question, c.answer) for c in one] == [(encode("q?"), encode("a!"))]
    assert len(cut) > 1 and not any(c.question or c.answer for c in cut)
    assert (several[0].question, several[0].answer) in [(encode("1?"), encode("one")), (encode("2?"), encode("two"))]
    assert none == [Section(encode("a text without an answer"))]


def test_excluded_sources_never_come(tmp_path):
    rows = [{"text": "q" * 20, "source": "bad/one"}, {"text": "w" * 20, "source": "good"}, {"text": "e" * 20}]
    stream = stream_of(write_rows(tmp_path / "a.jsonl", rows), exclude_sources=["bad"])
    seen = {TOKENIZER.decode(tokens)[0] for tokens, _, _ in sections_of(stream, 20)}
    assert seen == {"w", "e"}


@pytest.mark.parametrize("world", [2, 3])
def test_processes_read_disjoint_rows(tmp_path, world):
    rows = [{"text": f"row {index:03} " + "z" * 20} for index in range(12)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    seen = [
        {TOKENIZER.decode(tokens)[:7] for tokens, _, _ in sections_of(stream_of(path, rank=rank, world=world), 40)}
        for rank in range(world)
    ]
    assert set().union(*seen) == {row["text"][:7] for row in rows}
    assert sum(map(len, seen)) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"section_tokens": 8}, "section_tokens: expected at least 16, got 8"),
        ({"batch_tokens": 0}, "batch_tokens: expected at least 1"),
        ({"rank": 2, "world": 2}, "rank: expected 0 to 1 of 2 processes, got 2"),
    ],
)
def test_bad_settings(corpus, settings, message):
    with pytest.raises(ValueError, match=message):
        stream_of(corpus, **settings)


def test_files_with_nothing_to_read(tmp_path, monkeypatch):
    monkeypatch.setattr("ztok_fast.train.batches.BARREN_ROWS", 50)
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="expected at least one row, got none"):
        stream_of(empty).next_batch()
    short = write_rows(tmp_path / "short.jsonl", [{"text": ""}] * 3)
    with pytest.raises(
        ValueError, match="expected rows of at least 16 tokens outside the excluded sources, got none in 50 rows"
    ):
        stream_of(short).next_batch()


class TestTextData:
    def test_plain_and_compressed_files(self, tmp_path):
        rows = [{"text": "é\u2028x", "source": "a"}, {"text": ""}]
        plain = write_rows(tmp_path / "a.jsonl", rows)
        packed = tmp_path / "a.jsonl.gz"
        packed.write_bytes(gzip.compress(plain.read_bytes() + b"\n  \n"))
        assert list(iter_rows(plain)) == list(iter_rows(packed)) == rows
        assert list(iter_texts([plain, packed], ["a"])) == ["", ""]
        assert list(iter_texts([plain])) == ["é\u2028x", ""]

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b'{"text": "a"}\n{"text": \n', "line 2: expected a JSON object"),
            (b'{"text": "a"}\n\n["b"]\n', "line 3: expected a string field 'text', got none"),
            (b'{"text": 3}\n', "line 1: expected a string field 'text', got none"),
            (b'{"text": "\xff"}\n', "cannot be read as UTF-8 JSON lines"),
        ],
    )
    def test_bad_lines_are_named(self, tmp_path, data, message):
        (tmp_path / "bad.jsonl").write_bytes(data)
        with pytest.raises(DataError, match=f"bad.jsonl.*{message}"):
            list(iter_rows(tmp_path / "bad.jsonl"))

    def test_missing_truncated_and_damaged_files(self, tmp_path):
        with pytest.raises(DataError, match="expected an existing .jsonl or .jsonl.gz file"):
            list(iter_rows(tmp_path / "none.jsonl"))
        packed = gzip.compress(b'{"text": "some text that is long enough"}\n' * 50)
        damaged = bytearray(packed)
        damaged[15:40] = b"\xff" * 25
        for name, data in (("cut", packed[:-12]), ("other", b"not gzip"), ("damaged", bytes(damaged))):
            (tmp_path / f"{name}.jsonl.gz").write_bytes(data)
            with pytest.raises(DataError, match=f"{name}.jsonl.gz"):
                list(iter_rows(tmp_path / f"{name}.jsonl.gz"))
