"""Files of learned units: what is saved comes back, in few bytes, and nothing else does."""

import random
from dataclasses import replace

import pytest

from tests.codec.coded_files import altered, bounds_of
from tests.codec.documents import FINGERPRINT
from tests.codec.learned_files import POOLED, SLOTS, load, random_batch, save
from ztok_fast.codec import learned_records
from ztok_fast.codec.container import HEADER_BYTES, LEARNED_FORM, form_of
from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.documents import DocumentInfo, digest_of
from ztok_fast.codec.errors import ZBatchError, ZFileError
from ztok_fast.codec.learned_file import identity_of
from ztok_fast.codec.varint import join_parts, split_parts, varint

CONFIGS = pytest.mark.parametrize("config", [POOLED, SLOTS], ids=["pooled", "slots"])


@CONFIGS
def test_documents_survive_a_file(tmp_path, config):
    for seed in range(150):
        draw = random.Random(seed)
        z = random_batch(draw, config, draw.choice((0, 1, 1, 2, 5)))
        data = save(z, tmp_path / "x.ztok", config)
        assert load(tmp_path / "x.ztok", config) == z, seed
        assert save(z, tmp_path / "y.ztok", config) == data
    assert form_of(tmp_path / "x.ztok") is LEARNED_FORM


@CONFIGS
@pytest.mark.parametrize("count", [256, 257, 600])
def test_many_documents_have_an_index(tmp_path, config, count):
    z = random_batch(random.Random(count), config, count)
    data = save(z, tmp_path / "x.ztok", config)
    assert bool(data[2] & 128) == (count > 256)
    assert load(tmp_path / "x.ztok", config) == z


@pytest.mark.parametrize("size", [1, 99, 127, 128, 5000, 1 << 20])
def test_there_are_at_most_24_bytes_around_a_document(tmp_path, size):
    """Around its stream, its tokens and its ratio."""
    z = one_document(SLOTS, bytes(size))
    data = save(z, tmp_path / "x.ztok", SLOTS)
    _, payload = learned_records.write_document(z, SLOTS, None)
    assert len(data) - len(payload) <= 24
    assert load(tmp_path / "x.ztok", SLOTS) == z


def one_document(config, original=b"text", corrections=None, **changed):
    z = random_batch(random.Random(3), config, 1)
    while z.documents[0].byte_length is None or not z.ztokens:
        z = random_batch(random.Random(len(original) + z.ztokens + 7), config, 1)
    corrections = corrections or Corrections.of_remainder(b"remainder")
    info = DocumentInfo(z.tokens, 4.0, z.documents[0].levels, digest_of(original).hex(), len(original), corrections)
    return replace(z, documents=[replace(info, **changed)]).validate()


def test_a_stream_under_a_model_is_stored_where_it_is_smaller(tmp_path):
    z = one_document(SLOTS)
    adaptive = save(z, tmp_path / "x.ztok", SLOTS)
    asked = []

    def read(precision, streams, tokens):
        asked.append((precision, list(streams), list(tokens)))
        return z.part(0)

    data = save(z, tmp_path / "x.ztok", SLOTS, [b"ab"])
    assert len(data) < len(adaptive) and load(tmp_path / "x.ztok", SLOTS, read) == z
    assert asked == [("int8", [b"ab"], [z.tokens])]
    assert save(z, tmp_path / "x.ztok", SLOTS, [bytes(1000)]) == adaptive
    # A stream that says less than a byte can is not taken from the writer, nor by the reader.
    kind, payload = learned_records.write_document(z, SLOTS, b"ab")
    stored = learned_records.read_document(kind, 4, payload, bytes(8), SLOTS)
    assert stored.coding == learned_records.PRIOR
    assert learned_records.write_document(z, SLOTS, b"")[0] >> 4 == learned_records.ADAPTIVE


def test_only_the_codec_that_made_a_file_reads_it(tmp_path):
    path = tmp_path / "x.ztok"
    z = random_batch(random.Random(0), POOLED, 2)
    save(z, path, POOLED)
    other = replace(z, codec_fingerprint="0" * 64)
    save(other, path, POOLED)
    with pytest.raises(ZFileError, match=f"x.ztok: expected Z-tokens of the codec .*{FINGERPRINT[:16]}.* another one"):
        load(path, POOLED)
    identities = {identity_of(own, precision) for own in ("a", "b") for precision in ("int8", "float32", "float")}
    assert len(identities) == 6
    for precision in ("int8", "float32", "float"):
        save(replace(z, precision=precision), path, POOLED)
        assert load(path, POOLED).precision == precision


def test_what_cannot_be_written(tmp_path):
    z = one_document(POOLED)
    with pytest.raises(ZFileError, match="ends in .ztok"):
        save(z, tmp_path / "x.bin", POOLED)
    with pytest.raises(ZBatchError, match="codebook_size: expected 99"):
        save(z, tmp_path / "x.ztok", replace(POOLED, codebook_size=99))
    before = save(z, tmp_path / "x.ztok", POOLED)
    with pytest.raises(ZBatchError):
        save(replace(z, unit_lengths=z.unit_lengths + 100), tmp_path / "x.ztok", POOLED)
    assert (tmp_path / "x.ztok").read_bytes() == before


def test_each_kind_of_damage_has_its_message(tmp_path):
    path = tmp_path / "x.ztok"
    z = one_document(POOLED)
    kind, payload = learned_records.write_document(z, POOLED, None)
    data = save(replace(z, documents=[replace(z.documents[0], corrections=None, digest=None)]), path, POOLED)

    def message(changed: bytes) -> str:
        path.write_bytes(changed)
        with pytest.raises(ZFileError) as caught:
            load(path, POOLED)
        return str(caught.value)

    with pytest.raises(ZFileError, match="expected an existing"):
        load(tmp_path / "none.ztok", POOLED)
    assert "expected a whole file of learned units" in message(b"") + message(b"text") and "x.ztok" in message(b"")
    assert "coded units are text for storage" in message(b"ZC" + data[2:])
    assert "expected version 2 of learned units, got 1" in message(data[:2] + b"\x10" + data[3:])
    assert "the hash" in message(data[:-1]) + message(data + b"\0")
    assert "kind" in message(data[:HEADER_BYTES] + b"\x01" + data[HEADER_BYTES + 1 :])
    assert "another one" in message(data[:5] + bytes([data[5] ^ 1]) + data[6:])

    def reads(kind=kind, length=4, payload=payload, config=POOLED):
        stored = learned_records.read_document(kind, length, payload, bytes(8), config)
        return learned_records.read_ztokens(stored, config)

    reads()
    for wrong, expected in (
        ({"kind": kind | 14}, "kind of document"),
        ({"kind": kind ^ 48}, "kind of document"),
        ({"kind": 16, "length": 4}, "no original of generated"),
        ({"payload": varint(1 << 40)}, "tokens: expected at most"),
        ({"payload": payload[:-1]}, "Z-tokens"),
        ({"payload": varint(z.tokens + 1) + payload[1:]}, "expected units of"),
        ({"config": replace(POOLED, segment_length=5)}, "end where segments do"),
    ):
        with pytest.raises((ZFileError, ZBatchError), match=expected):
            reads(**wrong)


def test_bombs_are_not_inflated():
    z = one_document(POOLED, bytes(1 << 20), Corrections.stored_raw(bytes(1 << 20)))
    kind, payload = learned_records.write_document(z, POOLED, None)
    assert learned_records.read_document(kind, 1 << 20, payload, bytes(8), POOLED).info.corrections.raw == bytes(
        1 << 20
    )
    for length in (0, 1000, (1 << 20) - 1, (1 << 20) + 1, (1 << 63) - 1):
        with pytest.raises(ZFileError, match="expected a zlib stream"):
            learned_records.read_document(kind, length, payload, bytes(8), POOLED)


def test_parts_that_are_joined():
    for parts in ([], [b""], [b"", b""], [b"ab", b"", b"x" * 300, b"y"], [b"", b"", b"z"], [b"z", b""]):
        assert split_parts(join_parts(parts), len(parts)) == parts
    for data, count in ((b"a", 0), (b"\x05abc", 2), (b"\x80", 2)):
        with pytest.raises(ZFileError):
            split_parts(data, count)


@CONFIGS
@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_an_altered_file_is_an_error_or_the_same(tmp_path, config, count):
    """An exact document has the hash of its text, so that what is altered in it is found when it is decompressed."""
    path, files = tmp_path / "x.ztok", []
    for seed in range(9):
        z = random_batch(random.Random(seed), config, (1, 2, 5)[seed % 3])
        data = save(z, path, config)
        files.append((z, data, bounds_of(path, data)))
    foreign = save(replace(z, codec_fingerprint="0" * 64), path, config)
    same = 0
    for seed in range(count):
        draw = random.Random(seed)
        z, data, records = draw.choice(files)
        changed = altered(draw, data, records, foreign)
        if changed == data:
            continue
        path.write_bytes(changed)
        try:
            found = load(path, config)
        except ZFileError as error:
            assert str(path) in str(error), seed
            continue
        same += found == z
        for place, own in enumerate(found):
            if own.documents[0].digest is None:
                assert place < len(z) and own == z[place], seed
    assert same < count / 20


def test_a_lossy_document_that_was_altered_is_an_error(tmp_path):
    z = random_batch(random.Random(2), POOLED, 1)
    z = replace(z, documents=[DocumentInfo(z.tokens, 4.0, z.documents[0].levels, None, 7)]).validate()
    data, refused = save(z, tmp_path / "x.ztok", POOLED), 0
    for at in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            (tmp_path / "x.ztok").write_bytes(changed)
            try:
                found = load(tmp_path / "x.ztok", POOLED)
            except ZFileError:
                refused += 1
                continue
            # Said to be exact, it has a hash that no text has: decompressing it is an error.
            assert at == HEADER_BYTES and found.documents[0].digest is not None
    assert refused >= 8 * len(data) - 2
