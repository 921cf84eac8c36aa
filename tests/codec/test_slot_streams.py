"""Files of a codec: texts of every kind come back, from damaged ones an error, and slots are coded under its model."""

import random

import pytest
import torch

from tests.codec.coded_files import altered, bounds_of, records_of, words
from tests.codec.conftest import shared_codec
from tests.codec.tiny_slots import TEXTS, tiny_slot_codec
from ztok_fast.codec import learned_records
from ztok_fast.codec.errors import CodecError, ExactMismatchError, ZBatchError, ZFileError

HOSTILE = [
    b"the text is small; " * 12,
    b"",
    b"a",
    bytes(range(256)),
    b"\xff\xfe small \xc3",
    random.Random(0).randbytes(99),
]
ERRORS = (ZFileError, ZBatchError, ExactMismatchError)


@pytest.fixture(scope="module")
def slots():
    return tiny_slot_codec()


@pytest.fixture(params=["slots", "pooled"])
def codec(request, slots):
    return slots if request.param == "slots" else shared_codec("llama")


@pytest.fixture(params=[False, True], ids=["adaptive", "under the model"])
def prior(request, monkeypatch):
    if request.param:  # the model has not been trained: let tables that learn be worse still
        monkeypatch.setattr(learned_records, "encode_slots", lambda *settings: bytes(1 << 16))
    return request.param


def coding_of(path) -> set[int]:
    return {head.kind >> 4 for _, _, head in records_of(path)}


@pytest.mark.parametrize("engine", ["int8", "float32", "float"])
def test_every_byte_comes_back_through_a_file(codec, prior, tmp_path, monkeypatch, engine):
    if prior and (engine == "float" or codec.config.emission != "slots"):
        pytest.skip("nothing is coded under a model")
    monkeypatch.setattr(codec._engines, "choice", engine)
    z = codec.compress(HOSTILE, 6, exact=True)
    codec.save(z, tmp_path / "x.ztok")
    expected = {learned_records.ADAPTIVE, learned_records.PRIOR} if codec.config.emission == "slots" else {1}
    assert coding_of(tmp_path / "x.ztok") <= ({learned_records.PRIOR} if prior else expected)
    loaded = codec.load(tmp_path / "x.ztok")
    assert loaded == z and codec.decompress_bytes(loaded) == HOSTILE
    for text, one in zip(HOSTILE, z):
        codec.save(one, tmp_path / "one.ztok")
        assert codec.decompress_bytes(codec.load(tmp_path / "one.ztok")) == [text]
    lossy = codec.compress(TEXTS, 6)
    codec.save(lossy, tmp_path / "x.ztok")
    assert codec.load(tmp_path / "x.ztok") == lossy


def test_generated_ztokens_survive_a_file(codec, prior, tmp_path):
    if prior and codec.config.emission != "slots":
        pytest.skip("nothing is coded under a model")
    new = codec.generate(codec.compress(TEXTS, 4), 6, temperature=1.0, seed=1, end_threshold=1.0)
    codec.save(new, tmp_path / "new.ztok")
    assert codec.load(tmp_path / "new.ztok") == new


def test_the_engine_that_made_slots_reads_them(slots, tmp_path, monkeypatch):
    monkeypatch.setattr(learned_records, "encode_slots", lambda *settings: bytes(1 << 16))
    slots.save(slots.compress(TEXTS, 4), tmp_path / "x.ztok")
    monkeypatch.setattr(slots._engines, "choice", "float32")
    with pytest.raises(CodecError, match="expected 'int8', with which the slots of the file were coded"):
        slots.load(tmp_path / "x.ztok")


def test_instruction_sets_read_each_others_files(slots, prior, tmp_path):
    before, written = torch.ops.ztok.isa_native(-1), []
    found = [isa for isa in (0, 1, 2) if torch.ops.ztok.isa_native(isa) == isa]
    try:
        for isa in found:
            torch.ops.ztok.isa_native(isa)
            slots.save(slots.compress(HOSTILE, 6, exact=True), tmp_path / f"{isa}.ztok")
            written.append((tmp_path / f"{isa}.ztok").read_bytes())
        for isa in found:
            torch.ops.ztok.isa_native(isa)
            assert slots.decompress_bytes(slots.load(tmp_path / f"{found[found.index(isa) - 1]}.ztok")) == HOSTILE
    finally:
        torch.ops.ztok.isa_native(before)
    assert len(set(written)) == 1


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_an_altered_file_is_an_error_or_the_exact_text(codec, prior, tmp_path, count):
    if prior and codec.config.emission != "slots":
        pytest.skip("nothing is coded under a model")
    path, draw = tmp_path / "x.ztok", random.Random(1)
    texts = [[words(draw, 40), b"", words(draw, 5)], [HOSTILE[4]], [words(draw, 9)]]
    files = []
    for own in texts:
        z = codec.compress(own, 6, exact=True)
        for info, one in zip(z.documents, z):  # what is stored as it is has no remainder to alter
            assert info.corrections is not None and one.tokens == info.tokens
        codec.save(z, path)
        files.append(path.read_bytes())
    right = 0
    for seed in range(count):
        draw = random.Random(seed)
        index = draw.randrange(len(files))
        data = files[index]
        changed = altered(draw, data, bounds_of(path, data), files[index - 1])
        path.write_bytes(changed)
        try:
            assert codec.decompress_bytes(codec.load(path)) == texts[index], f"seed {seed}: another text"
            right += changed != data
        except ERRORS:
            continue
    assert right < count / 5
