"""Exact mode: every byte of whatever text comes back, or an error that says so."""

from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.codec.conftest import shared_codec
from tests.codec.tiny_codec import tiny_codec
from ztok_fast.codec.errors import ExactMismatchError, ZBatchError
from ztok_fast.codec.exact import MARGIN, find_corrections, join, split
from ztok_fast.codec.passes import compress_documents, decompress_documents, teacher_forced

NASTY = st.text(
    st.sampled_from("ab \r\n\t\0é東🙂\u200d\ufeff\u0301\ud800\udfff")
    | st.characters(codec=None, exclude_categories=()),
    max_size=40,
)
PIECES = st.lists(
    NASTY
    | st.sampled_from(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|", "\r\n", "small text ", "👩\u200d👩\u200d👧"]
    ),
    max_size=4,
).map("".join)


@cache
def float_codec():
    """Runs without the engine, so that corrections are stored."""
    own = tiny_codec()
    own._engines.choice = "float"
    return own


@pytest.fixture(params=["int8", "float"])
def any_codec(request):
    return shared_codec("llama") if request.param == "int8" else float_codec()


@pytest.fixture
def codec():
    own = float_codec()
    own._engines.use()
    return own


@given(st.lists(PIECES | st.binary(max_size=30), min_size=1, max_size=3), st.sampled_from([1, 2.5, 8]))
@example(["\ud83d\ude42", b"\xed\xa0\x80", b"\xff", "", "\0"], 2)
@example(["<|im_start|>user\n<|im_end|>"], 4)
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("engine", ["int8", "float"])
def test_every_byte_comes_back(engine, texts, ratio):
    codec = shared_codec("llama") if engine == "int8" else float_codec()
    z = codec.compress(texts, ratio=ratio, exact=True)
    expected = [t if isinstance(t, bytes) else t.encode("utf-8", "surrogatepass") for t in texts]
    assert codec.decompress_bytes(z) == expected
    for text, back in zip(texts, codec.decompress(z)):
        if isinstance(text, str):
            assert back == text or back.encode("utf-8", "surrogatepass") == text.encode("utf-8", "surrogatepass")


def test_bytes_that_are_not_utf8_come_back_as_surrogate_escapes(any_codec):
    data = b"caf\xe9 \xff"
    assert any_codec.decompress(any_codec.compress([data], ratio=2, exact=True)) == [
        data.decode("utf-8", "surrogateescape")
    ]


@pytest.mark.parametrize("size", [50_000, 1_000_000])
def test_one_character_many_times(any_codec, size):
    text = "z" * size
    z = any_codec.compress([text], ratio=8, exact=True)
    assert z.tokens == size
    assert any_codec.decompress(z) == [text]


def test_documents_do_not_depend_on_their_batch(any_codec):
    texts = ["The text is small, as small texts go. " * 4, "Another, smaller text.", "!"]
    z = any_codec.compress(texts, ratio=2, exact=True)
    assert [any_codec.decompress(z[i])[0] for i in range(3)] == texts
    assert any_codec.decompress(z, batch_segments=1) == texts


def exact_document(codec, text="The small text that is tampered with; " * 3):
    z = codec.compress([text], ratio=4, exact=True)
    if z.documents[0].corrections.raw is not None:  # a random model is always wrong, and then raw bytes are smaller
        tokens = codec.tokenizer(text)["input_ids"]
        z.documents[0].corrections.raw = None
        z.documents[0].corrections.positions = torch.arange(len(tokens), dtype=torch.int32)
        z.documents[0].corrections.tokens = torch.tensor(tokens, dtype=torch.int32)
    assert codec.decompress(z) == [text]
    return z


def test_tampered_corrections_are_an_error_and_not_wrong_text(codec):
    z = exact_document(codec)
    z.documents[0].corrections.tokens[3] += 1
    with pytest.raises(ExactMismatchError, match="is not the original .* It is damaged, or"):
        codec.decompress(z)


def test_tampered_hash_is_an_error(codec):
    z = exact_document(codec)
    z.documents[0].digest = "0" * 16
    with pytest.raises(ExactMismatchError):
        codec.decompress(z)


def test_tampered_codes_without_corrections_there_are_an_error(codec):
    z = exact_document(codec)
    corrections = z.documents[0].corrections
    corrections.positions, corrections.tokens = corrections.positions[1:], corrections.tokens[1:]
    first = codec.decompress_tokens(z)[0][0]
    if first == codec.tokenizer("The")["input_ids"][0]:
        pytest.fail("the random model should not know the first token")
    with pytest.raises(ExactMismatchError):
        codec.decompress(z)


def test_correction_of_a_token_that_is_not_there(codec):
    z = exact_document(codec)
    z.documents[0].corrections.positions[-1] = z.documents[0].tokens
    with pytest.raises(ZBatchError, match="expected indices below the document's"):
        codec.decompress(z)


def test_right_tokens_are_not_stored_and_near_ties_are(codec):
    """A document that the model itself wrote needs corrections only where its best two tokens are close."""
    model = codec.model
    start = compress_documents(model, [list(range(3, 35))], 4.0)
    own = decompress_documents(model, start)
    corrections = find_corrections(model, start, own)[0]
    _, margin, _ = teacher_forced(model, start, torch.tensor(own[0]))
    assert set(corrections) == set((margin < MARGIN).nonzero()[:, 0].tolist())
    assert len(corrections) < 4
    assert decompress_documents(model, start, [corrections]) == own


def test_corrections_repair_decoding_that_drifts(codec, monkeypatch):
    """Where teacher forcing says all is right and decoding says otherwise, decoding decides."""
    from ztok_fast.codec import exact

    model = codec.model
    documents = [list(range(3, 35))]
    z = compress_documents(model, documents, 4.0)
    monkeypatch.setattr(
        exact,
        "teacher_forced",
        lambda model, z, tokens: (tokens, torch.full((32,), 1e9), None),
    )
    corrections = find_corrections(model, z, documents)
    assert corrections[0] and [own.tolist() for own in decompress_documents(model, z, corrections)] == documents


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_join_and_split_are_inverse(lengths, data):
    from ztok_fast.codec.corrections import Corrections

    sections = [{p: data.draw(st.integers(0, 99)) for p in data.draw(st.sets(st.integers(0, n - 1)))} for n in lengths]
    positions, tokens = join(sections, lengths)
    assert split(Corrections(positions, tokens), lengths) == sections
    assert split(None, lengths) == [{} for _ in lengths]
