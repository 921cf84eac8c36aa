"""What a file states, with a right checksum, is compared with the codec before it is used."""

from dataclasses import replace

import pytest
import torch

from tests.codec.documents import int32
from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.documents import DocumentInfo
from ztok_fast.codec.errors import ZBatchError
from ztok_fast.codec.zbatch import ZBatch

TEXTS = ["A small text to compress; " * 2, "", "a" * 150, "Small texts: \u6771\u4eac \U0001f642."]


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
    loaded = change(z)
    for use in (codec.decompress, codec.generate, lambda z: codec.answer(z, "Which?")):
        with pytest.raises(ZBatchError, match=message):
            use(loaded)


def test_generated_segments_need_not_be_full(codec):
    z = codec.generate(codec.compress(TEXTS[:1], ratio=3), 24, temperature=1.0, seed=1)
    assert all(isinstance(d, DocumentInfo) and d.digest is None for d in z.documents)
    assert len(codec.decompress(z)) == 1
