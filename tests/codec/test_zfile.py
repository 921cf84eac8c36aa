import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.numpy import save as serialize
from safetensors.torch import save_file

from tests.codec.documents import batches, example
from ztok_fast.codec import zfile
from ztok_fast.codec.errors import ZBatchError, ZFileError
from ztok_fast.codec.zbatch import ZBatch


@settings(max_examples=50, deadline=None)
@given(batches())
def test_a_batch_survives_tensors_and_metadata(batch):
    tensors, metadata = zfile.to_tensors(batch)
    assert all(tensor.dtype == np.uint8 for tensor in tensors.values())
    assert zfile.from_tensors(tensors, metadata, ZBatch) == batch


def test_a_batch_survives_a_file(tmp_path):
    path = tmp_path / "documents.ztok"
    example().save(path)
    assert ZBatch.load(path) == example()
    assert [file.name for file in tmp_path.iterdir()] == ["documents.ztok"]


def test_a_document_taken_from_a_batch_survives_a_file(tmp_path):
    for index, one in enumerate(example()):
        path = tmp_path / f"{index}.ztok"
        one.save(path)
        assert ZBatch.load(path) == one


def test_metadata_says_what_the_file_holds():
    _, metadata = zfile.to_tensors(example())
    documents = json.loads(metadata["documents"])
    assert metadata["format"] == "ztok" and metadata["format_version"] == "1"
    assert metadata["codec_fingerprint"] == example().codec_fingerprint
    assert documents[0]["achieved_ratio"] == 4.0 and documents[0]["budget"] == 4.0
    assert documents[0]["rate"] == pytest.approx(example()[0].rate)
    assert documents[2]["byte_length"] == 37 and len(documents[2]["sha256"]) == 64
    assert documents[1]["rate"] is None


def test_codes_and_unit_lengths_are_packed_to_the_bits_they_need():
    tensors, _ = zfile.to_tensors(example())
    # Documents of 3, 0, 2 and 1 Z-tokens with 2, 2, 1 and 2 codes of 4 bits; 6 unit lengths of 3 bits.
    assert len(tensors["codes"]) == 3 + 0 + 1 + 1
    assert len(tensors["unit_lengths"]) == 3


def test_an_older_file_survives_a_save_that_fails(tmp_path):
    path = tmp_path / "documents.ztok"
    example().save(path)
    with pytest.raises(ZBatchError):
        replace(example(), codebook_size=2).save(path)
    assert ZBatch.load(path) == example()
    assert len(list(tmp_path.iterdir())) == 1


def test_saving_replaces_an_older_file(tmp_path):
    path = tmp_path / "documents.ztok"
    example().save(path)
    example()[0].save(path)
    assert ZBatch.load(path) == example()[0]


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ZFileError, match="ends in .ztok"):
        example().save(tmp_path / "documents.bin")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ZFileError, match="nowhere.ztok: expected an existing"):
        ZBatch.load(tmp_path / "nowhere.ztok")


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "documents.ztok"
    example().save(path)
    data = path.read_bytes()
    for length in [0, 1, 7, 8, 9, *range(10, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ZFileError, match="documents.ztok: "):
            ZBatch.load(path)


def test_every_flipped_byte_is_refused(tmp_path):
    path = tmp_path / "documents.ztok"
    example()[2].save(path)
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ZFileError, match="documents.ztok: "):
            ZBatch.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"plain text", b"PK\x03\x04" * 40, b"\x00" * 64], ids=["empty", "text", "zip", "zeros"]
)
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "foreign.ztok"
    path.write_bytes(content)
    with pytest.raises(ZFileError, match="not a whole .ztok file"):
        ZBatch.load(path)


def test_other_safetensors_are_refused(tmp_path):
    path = tmp_path / "foreign.ztok"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ZFileError, match="safetensors file of another kind"):
        ZBatch.load(path)


def rewrite(path, change_tensors=None, change_metadata=None):
    """Write the example with changes and a content hash that agrees with them."""
    tensors, metadata = zfile.to_tensors(example())
    if change_tensors:
        change_tensors(tensors)
    if change_metadata:
        change_metadata(metadata)
    metadata["content_sha256"] = zfile.content_sha256(tensors, metadata)
    path.write_bytes(serialize(tensors, metadata))


def test_rewriting_without_a_change_is_valid(tmp_path):
    path = tmp_path / "same.ztok"
    rewrite(path)
    assert ZBatch.load(path) == example()


def shorten(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


def lengthen(name):
    return lambda tensors: tensors.update({name: np.append(tensors[name], np.uint8(0))})


def flip(name, place=0, mask=1):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][place] ^= mask

    return change


@pytest.mark.parametrize("name", zfile.TENSORS)
@pytest.mark.parametrize("change", [shorten, lengthen])
def test_a_tensor_of_another_length_is_refused(tmp_path, name, change):
    path = tmp_path / "bad.ztok"
    rewrite(path, change(name))
    with pytest.raises(ZFileError, match=f"bad.ztok: .*{name}: expected"):
        ZBatch.load(path)


TENSOR_FAULTS = {
    "missing": (lambda t: t.pop("raw"), "expected the tensors"),
    "unknown": (lambda t: t.update(extra=t["raw"]), "expected the tensors"),
    "float": (lambda t: t.update(codes=t["codes"].astype(np.float32)), "codes: expected a uint8 vector, got float32"),
    "matrix": (lambda t: t.update(codes=t["codes"][None]), "codes: expected a uint8 vector, got uint8"),
    "a unit of another length": (flip("unit_lengths"), "document 0: unit_lengths: expected to cover its 12"),
    "a segment of another length": (flip("segment_rows"), "expected its 3 Z-tokens in its segments, got 4"),
    "bits after the last code": (flip("segment_rows", place=1, mask=0x80), "segment_rows: .*expected zeros"),
    "position past the end": (lambda t: t.update(correction_gaps=t["correction_gaps"] | 0b111111), "indices below"),
    "raw not zlib": (lambda t: t.update(raw=t["raw"][::-1].copy()), "raw: expected a zlib stream"),
    "patch not zlib": (lambda t: t.update(patches=t["patches"][::-1].copy()), "patches: expected a zlib stream"),
}


@pytest.mark.parametrize(("change", "message"), TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_tampered_tensors_are_refused(tmp_path, change, message):
    path = tmp_path / "bad.ztok"
    rewrite(path, change)
    with pytest.raises(ZFileError, match=f"bad.ztok: .*{message}"):
        ZBatch.load(path)


METADATA_FAULTS = {
    "other version": ({"format_version": "3"}, "format version 1 or 2, got '3'"),
    "no version": ({"format_version": None}, "format version 1 or 2, got None"),
    "other format": ({"format": "zip"}, "another kind"),
    "fingerprint upper case": ({"codec_fingerprint": "A" * 64}, "codec_fingerprint: expected 64"),
    "fingerprint missing": ({"codec_fingerprint": None}, "codec_fingerprint: expected 64"),
    "count missing": ({"segments": None}, "metadata segments: expected a decimal"),
    "count negative": ({"segments": "-1"}, "metadata segments: expected a decimal"),
    "count of other digits": ({"segments": "٣"}, "metadata segments: expected a decimal"),
    "count huge": ({"segments": "9" * 10}, "metadata segments: expected a decimal"),
    "segments many": ({"segments": "1000000"}, "segment_rows: expected"),
    "segments few": ({"segments": "4"}, "segment_rows|segments"),
    "no bits": ({"segment_bits": "0"}, "segment_bits: expected 1 to 32"),
    "many bits": ({"segment_bits": "33"}, "segment_bits: expected 1 to 32"),
    "many codebooks": ({"num_codebooks": "2000000000"}, "num_codebooks: expected 1 to 256"),
    "no codebooks": ({"num_codebooks": "0"}, "num_codebooks: expected 1 to 256"),
    "small codebook": ({"codebook_size": "1"}, "codebook_size of 2 or more"),
    "other codebook": ({"codebook_size": "17"}, "codes: expected"),
    "codebook below the codes": ({"codebook_size": "9"}, "codes: expected 0 to 8"),
    "no unit length": ({"max_unit_length": "0"}, "max_unit_length of 1"),
    "documents not JSON": ({"documents": "[{"}, "documents: expected a JSON list"),
    "documents an object": ({"documents": "{}"}, "documents: expected a JSON list of objects"),
    "documents numbers": ({"documents": "[1]"}, "documents: expected a JSON list of objects"),
    "documents nested deeply": ({"documents": "[" * 200_000}, "documents: expected a JSON list"),
    "no documents": ({"documents": "[]"}, "segments: expected 0 as the documents state, got 5"),
}


@pytest.mark.parametrize(("change", "message"), METADATA_FAULTS.values(), ids=METADATA_FAULTS)
def test_tampered_metadata_is_refused(tmp_path, change, message):
    def apply(metadata):
        for key, value in change.items():
            metadata.pop(key) if value is None else metadata.update({key: value})

    path = tmp_path / "bad.ztok"
    rewrite(path, change_metadata=apply)
    with pytest.raises(ZFileError, match=f"bad.ztok: .*{message}"):
        ZBatch.load(path)


ENTRY_FAULTS = {
    "tokens": ({"tokens": 8}, "unit_lengths: expected to cover its 8"),
    "tokens text": ({"tokens": "7"}, "tokens: expected a count, got 7"),
    "tokens huge": ({"tokens": 10**30}, "tokens: expected a count"),
    "tokens true": ({"tokens": True}, "tokens: expected a count"),
    "segments": ({"segments": 2}, "expected its 2 Z-tokens in its segments, got 3"),
    "segments past the end": ({"segments": 2_000_000}, "in its segments"),
    "Z-tokens": ({"ztokens": 1}, "expected its 1 Z-tokens"),
    "levels none": ({"levels": 0}, "levels: expected 1 to 2"),
    "levels other": ({"levels": 2}, "codes: expected"),
    "budget missing": ({"budget": None}, "budget: expected a number"),
    "budget small": ({"budget": 0.1}, "budget: expected a ratio"),
    "ratio": ({"achieved_ratio": 99.0}, "achieved_ratio: expected 3.5"),
    "rate": ({"rate": None}, "rate: expected"),
    "sha256": ({"sha256": "00"}, "sha256: expected 64"),
    "sha256 number": ({"sha256": 5}, "sha256: expected 64"),
    "length missing": ({"byte_length": None}, "expected both or neither"),
    "corrections list": ({"corrections": [1]}, "corrections: expected an object"),
    "corrections left out": ({"corrections": None}, "correction_gaps|patches"),
}


@pytest.mark.parametrize(("change", "message"), ENTRY_FAULTS.values(), ids=ENTRY_FAULTS)
def test_a_tampered_document_entry_is_refused(tmp_path, change, message):
    path = tmp_path / "bad.ztok"
    rewrite(path, change_metadata=change_entry(2, change))
    with pytest.raises(ZFileError, match=f"bad.ztok: .*{message}"):
        ZBatch.load(path)


CORRECTION_FAULTS = {
    "count": (2, {"count": 9}, "correction_gaps: expected"),
    "gap bits": (2, {"gap_bits": 0}, "gap_bits: expected 1 to 32"),
    "token bits": (2, {"token_bits": 40}, "token_bits: expected 1 to 32"),
    "patch not an object": (2, {"patch": 3}, "patch: expected an object"),
    "patch range": (2, {"patch": {"start": 4, "end": 2, "length": 3, "stored": 11}}, "0 <= start <= end"),
    "patch longer": (2, {"patch": {"start": 2, "end": 4, "length": 4, "stored": 11}}, "zlib stream of 4 bytes"),
    "patch shorter": (2, {"patch": {"start": 2, "end": 4, "length": 2, "stored": 11}}, "zlib stream of 2 bytes"),
    "patch stored": (2, {"patch": {"start": 2, "end": 4, "length": 3, "stored": 90}}, "patches: expected 90 more"),
    "raw stored": (3, {"raw_stored": 1}, "raw: expected a zlib stream"),
}


@pytest.mark.parametrize(("index", "change", "message"), CORRECTION_FAULTS.values(), ids=CORRECTION_FAULTS)
def test_tampered_corrections_are_refused(tmp_path, index, change, message):
    path = tmp_path / "bad.ztok"
    corrections = json.loads(zfile.to_tensors(example())[1]["documents"])[index]["corrections"]
    rewrite(path, change_metadata=change_entry(index, {"corrections": corrections | change}))
    with pytest.raises(ZFileError, match=f"bad.ztok: document {index}: .*{message}"):
        ZBatch.load(path)


def change_entry(index, change):
    def apply(metadata):
        documents = json.loads(metadata["documents"])
        documents[index].update(change)
        metadata["documents"] = json.dumps(documents)

    return apply


def test_a_stream_that_inflates_past_its_stated_length_is_not_inflated(tmp_path):
    """A few kilobytes can hold gigabytes; no more than what is stated is ever made."""
    import zlib

    bomb = np.frombuffer(zlib.compress(bytes(50_000_000), 9), np.uint8)

    def swell(tensors):
        tensors["raw"] = bomb

    corrections = json.loads(zfile.to_tensors(example())[1]["documents"])[3]["corrections"]
    path = tmp_path / "bomb.ztok"
    rewrite(path, swell, change_entry(3, {"corrections": corrections | {"raw_stored": len(bomb)}}))
    with pytest.raises(ZFileError, match="zlib stream of 24 bytes"):
        ZBatch.load(path)
