"""What a file states, with a right checksum, is compared with the codec before it is used."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.numpy import save as serialize

from tests.codec.documents import int32
from ztok_fast.codec import zfile
from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.documents import DocumentInfo
from ztok_fast.codec.errors import ZBatchError
from ztok_fast.codec.zbatch import ZBatch

TEXTS = ["A small text to compress; " * 2, "", "a" * 150, "Small texts: \u6771\u4eac \U0001f642."]
VALUES = (
    None,
    "text",
    True,
    -1,
    0,
    1,
    2,
    3,
    9,
    15,
    17,
    240,
    2**31 - 1,
    10**400,
    0.5,
    3.5,
    [],
    {},
    "f" * 64,
    float("inf"),
)


def compress(codec, exact: bool) -> ZBatch:
    one_level = codec.compress(TEXTS[3:], ratio=3, exact=exact, levels=1)
    return one_level if exact else ZBatch.concatenate([codec.compress(TEXTS[:3], ratio=3), one_level])


def write(path, tensors, metadata) -> None:
    metadata = metadata | {"content_sha256": zfile.content_sha256(tensors, metadata)}
    path.write_bytes(serialize(tensors, metadata))


def fields(metadata: dict) -> list[tuple]:
    """Places in a file's metadata: of the file, of each document, of its corrections and of their patch."""
    places = [(name,) for name in metadata if name != "content_sha256"]
    for index, entry in enumerate(json.loads(metadata["documents"])):
        places += [("documents", index, name) for name in entry]
        corrections = entry["corrections"] or {}
        places += [("documents", index, "corrections", name) for name in (*corrections, "raw_stored", "patch")]
        places += [("documents", index, "corrections", "patch", name) for name in corrections.get("patch", ())]
    return places


def changed(metadata: dict, place: tuple, value) -> dict:
    if len(place) == 1:
        return metadata | {place[0]: value if isinstance(value, str) else json.dumps(value)}
    documents = json.loads(metadata["documents"])
    at = documents
    for step in place[1:-1]:
        at = at[step]
    if at is None:
        return metadata
    at[place[-1]] = value
    # json.dumps refuses integers as long as the longest that are tried here.
    return metadata | {"documents": json.dumps(documents).replace("Infinity", "1" + "0" * 5000)}


@pytest.mark.parametrize("exact", [False, True], ids=["lossy", "exact"])
def test_no_stated_number_gives_another_error_or_another_text(codec, tmp_path, exact):
    z = compress(codec, exact)
    expected = codec.decompress_bytes(z)
    tensors, metadata = zfile.to_tensors(z)
    path = tmp_path / "changed.ztok"
    read, refused = 0, 0
    for place in fields(metadata):
        for value in VALUES:
            write(path, tensors, changed(metadata, place, value))
            try:
                loaded = ZBatch.load(path)
                # What no lossy decode reads is set back, so that a decode is run only where something else differs.
                for document, own in zip(loaded.documents, z.documents):
                    document.budget = own.budget
                    if document.corrections is None:
                        document.sha256, document.byte_length = own.sha256, own.byte_length
                documents = expected if loaded == z else codec.decompress_bytes(loaded)
            except ValueError as error:
                assert type(error).__module__ == "ztok_fast.codec.errors", (place, value, error)
                refused += 1
                continue
            assert documents == expected, (place, value)
            read += 1
    assert refused > read > 0


def merged(z: ZBatch) -> ZBatch:
    """The first two segments as one."""
    cu_documents = z.cu_documents.clone()
    cu_documents[1:] -= 1
    return replace(z, cu_segments=torch.cat([z.cu_segments[:1], z.cu_segments[2:]]), cu_documents=cu_documents)


def split(z: ZBatch, row: int) -> ZBatch:
    """The first segment in two, after ``row`` Z-tokens."""
    cu_segments = torch.cat([z.cu_segments[:1], int32([row]), z.cu_segments[1:]])
    cu_documents = z.cu_documents.clone()
    cu_documents[1:] += 1
    return replace(z, cu_segments=cu_segments, cu_documents=cu_documents)


def with_token(z: ZBatch, token: int) -> ZBatch:
    return replace(z, documents=[replace(z.documents[0], corrections=Corrections(int32([3]), int32([token])))])


FAULTS = {
    "more codebooks": (
        lambda z: replace(z, codes=torch.nn.functional.pad(z.codes, (0, 238), value=-1)),
        "num_codebooks: expected 2, as the codec has, got 240",
    ),
    "larger codebook": (lambda z: replace(z, codebook_size=17), "codebook_size: expected 16, .* got 17"),
    "longer units": (lambda z: replace(z, max_unit_length=9), "max_unit_length: expected 8, .* got 9"),
    "segments merged": (merged, "document 0: segments: expected at most 16 text tokens in each, got 32"),
    "segment split": (lambda z: split(z, 1), "document 0: segments: expected 16 text tokens in each but the last"),
    "segment without Z-tokens": (
        lambda z: split(z, 0),
        "document 0: segments: expected at least 1 text token in each, got 0",
    ),
    "token past the vocabulary": (lambda z: with_token(z, 2**31 - 1), "corrections.tokens: expected token ids below"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_a_valid_file_that_is_not_of_this_codec_is_refused(codec, tmp_path, change, message):
    z = codec.compress(TEXTS[:1], ratio=3, exact=True)
    change(z).save(tmp_path / "other.ztok")
    loaded = ZBatch.load(tmp_path / "other.ztok")
    for use in (codec.decompress, codec.generate, lambda z: codec.answer(z, "Which?")):
        with pytest.raises(ZBatchError, match=message):
            use(loaded)


def test_generated_segments_need_not_be_full(codec):
    z = codec.generate(codec.compress(TEXTS[:1], ratio=3), 24, temperature=1.0, seed=1)
    assert all(isinstance(d, DocumentInfo) and d.sha256 is None for d in z.documents)
    assert len(codec.decompress(z)) == 1
