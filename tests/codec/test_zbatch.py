import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from tests.codec.documents import FINGERPRINT, batches, example, int32, make_batch
from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.documents import DocumentInfo, digest_of
from ztok_fast.codec.errors import ExactMismatchError, ZBatchError
from ztok_fast.codec.exact_patch import Patch
from ztok_fast.codec.zbatch import ZBatch


def test_the_example_is_valid_and_counts_documents_tokens_and_rows():
    batch = example().validate()
    assert len(batch) == 4
    assert (batch.tokens, batch.ztokens, batch.num_codebooks) == (21, 6, 2)
    assert batch.cu_ztokens.tolist() == [0, 3, 3, 5, 6]


def test_ratio_and_rate_count_levels_and_unit_lengths():
    batch = example()
    assert batch[0].achieved_ratio == 12 / 3
    assert batch[0].rate == pytest.approx(3 * (2 * 4 + 3) / 12)
    assert batch[2].rate == pytest.approx(2 * (1 * 4 + 3) / 7)
    assert batch.rate == pytest.approx((3 * 11 + 2 * 7 + 11) / 21)
    assert math.isnan(batch[1].achieved_ratio) and math.isnan(batch[1].rate) and math.isnan(batch[1].rate_exact)


def test_exact_rate_counts_the_stored_bytes_of_the_corrections():
    one = example()[2]
    stored = one.documents[0].corrections.stored_bytes
    assert stored > 0
    assert one.rate_exact == pytest.approx(one.rate + 8 * stored / 7)
    assert example()[0].rate_exact == example()[0].rate


def test_indexing_gives_a_batch_of_one_document():
    batch = example()
    second = batch[2].validate()
    assert second.codes.tolist() == [[9, -1], [0, -1]]
    assert second.unit_lengths.tolist() == [4, 3]
    assert second.cu_segments.tolist() == [0, 2] and second.cu_documents.tolist() == [0, 1]
    assert second.documents == [batch.documents[2]]
    assert batch[-1] == batch[3]
    assert batch[1].validate().cu_segments.tolist() == [0]
    for index in (4, -5):
        with pytest.raises(IndexError, match="expected a document"):
            batch[index]


@settings(max_examples=50, deadline=None)
@given(batches())
def test_documents_taken_apart_and_joined_are_the_batch(batch):
    batch.validate()
    if len(batch):
        assert ZBatch.concatenate([one.validate() for one in batch]) == batch
        assert ZBatch.concatenate([batch, batch]).validate()[len(batch)] == batch[0]
    else:
        assert list(batch) == []


def test_equality_sees_every_part():
    batch = example()
    assert batch == copy.deepcopy(batch)
    assert batch != "text"
    for change in (
        {"codes": batch.codes + 1},
        {"unit_lengths": batch.unit_lengths.flip(0)},
        {"cu_segments": int32([0, 1, 2, 3, 5, 6])},
        {"cu_documents": int32([0, 2, 3, 4, 5])},
        {"documents": [*batch.documents[:-1], replace(batch.documents[-1], corrections=None)]},
        {"codec_fingerprint": "0" * 64},
        {"codebook_size": 17},
        {"max_unit_length": 9},
    ):
        assert batch != replace(batch, **change), change


def test_concatenating_needs_batches_of_one_codec():
    batch = example()
    with pytest.raises(ZBatchError, match="at least one"):
        ZBatch.concatenate([])
    with pytest.raises(ZBatchError, match="codec: expected the one with fingerprint"):
        ZBatch.concatenate([batch, replace(batch, codec_fingerprint="0" * 64)])
    with pytest.raises(ZBatchError, match="codebook_size 16"):
        ZBatch.concatenate([batch, replace(batch, codebook_size=32)])


def test_check_codec_passes_its_own_codec_only():
    example().check_codec(FINGERPRINT)
    with pytest.raises(ZBatchError, match="which compressed this, got 0000"):
        example().check_codec("0" * 64)


FAULTS = {
    "fingerprint not hex": (lambda b: {"codec_fingerprint": "Z" * 64}, "codec_fingerprint: expected 64"),
    "fingerprint short": (lambda b: {"codec_fingerprint": "ab"}, "codec_fingerprint: expected 64"),
    "codebook too small": (lambda b: {"codebook_size": 1}, "codebook_size: expected an integer from 2"),
    "no unit length": (lambda b: {"max_unit_length": 0}, "max_unit_length: expected an integer from 1"),
    "codes int64": (lambda b: {"codes": b.codes.long()}, "codes: expected an int32 tensor of 2"),
    "codes flat": (lambda b: {"codes": b.codes.reshape(-1)}, "codes: expected an int32 tensor of 2"),
    "codes elsewhere": (lambda b: {"codes": b.codes.to("meta")}, "codes: expected a tensor on the CPU, got .* meta"),
    "codes list": (lambda b: {"codes": b.codes.tolist()}, "codes: expected an int32 tensor .* got list"),
    "no codebooks": (lambda b: {"codes": b.codes[:, :0]}, "codes: expected 1 to 256 codebooks"),
    "unit missing": (lambda b: {"unit_lengths": b.unit_lengths[:-1]}, "unit_lengths: expected one for each of 6"),
    "segments fall short": (
        lambda b: {"cu_segments": int32([0, 2, 2, 3, 5, 5])},
        "cu_segments: expected offsets from 0 to the 6",
    ),
    "segments start late": (
        lambda b: {"cu_segments": int32([1, 2, 2, 3, 5, 6])},
        "cu_segments: expected offsets from 0",
    ),
    "no offsets": (lambda b: {"cu_segments": int32([])}, "cu_segments: expected offsets .* got none"),
    "segments fall": (lambda b: {"cu_segments": int32([0, 3, 2, 3, 5, 6])}, "cu_segments: expected non-decreasing"),
    "documents fall": (lambda b: {"cu_documents": int32([0, 4, 3, 4, 5])}, "cu_documents: expected non-decreasing"),
    "document missing": (lambda b: {"documents": b.documents[:-1]}, "documents: expected 4, got 3"),
    "unit of zero": (lambda b: {"unit_lengths": int32([4, 0, 8, 4, 3, 2])}, "unit_lengths: expected 1 to 8, got 0"),
    "unit too long": (
        lambda b: {"unit_lengths": int32([1, 2, 9, 4, 3, 2])},
        "unit_lengths: expected 1 to 8, got 1 to 9",
    ),
    "units do not cover": (
        lambda b: {"unit_lengths": int32([3, 2, 8, 4, 3, 2])},
        "document 0: unit_lengths: expected to cover its 12",
    ),
    "code too large": (lambda b: {"codebook_size": 15}, "document 0: codes: expected 0 to 14"),
    "code dropped": (
        lambda b: {"codes": torch.where(b.codes == 15, -1, b.codes)},
        "document 0: codes: expected 0 to 15",
    ),
    "code not dropped": (lambda b: {"codes": b.codes.clamp(min=0)}, "document 2: codes: expected -1 past its 1"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_validate_names_what_does_not_fit(change, message):
    batch = example()
    with pytest.raises(ZBatchError, match=message):
        replace(batch, **change(batch)).validate()


DIGEST = digest_of(b"abc").hex()
EMPTY = Corrections.none_needed()
DOCUMENT_FAULTS = {
    "tokens negative": ({"tokens": -1}, "tokens: expected an integer of at least 0"),
    "tokens float": ({"tokens": 12.0}, "tokens: expected an integer"),
    "budget below one": ({"budget": 0.5}, "budget: expected a ratio"),
    "budget nan": ({"budget": math.nan}, "budget: expected a ratio"),
    "budget infinite": ({"budget": math.inf}, "budget: expected a ratio"),
    "levels zero": ({"levels": 0}, "levels: expected an integer from 1 to 2"),
    "levels many": ({"levels": 3}, "levels: expected an integer from 1 to 2"),
    "digest alone": ({"digest": DIGEST}, "digest: expected one with"),
    "digest short": ({"digest": "ab", "byte_length": 3, "corrections": EMPTY}, "digest: expected 16"),
    "length negative": ({"byte_length": -1}, "byte_length: expected an integer"),
    "corrections alone": ({"corrections": EMPTY}, "digest: expected one with"),
    "corrections without a length": ({"corrections": EMPTY, "digest": DIGEST}, "expected the byte_length"),
    "raw of other length": (
        {"digest": DIGEST, "byte_length": 3, "corrections": Corrections.stored_raw(b"abcd")},
        "corrections.raw: expected 3 bytes",
    ),
    "raw and patch": (
        {
            "digest": DIGEST,
            "byte_length": 3,
            "corrections": Corrections(int32([]), int32([]), Patch(0, 0, b""), b"abc"),
        },
        "expected raw bytes alone",
    ),
    "positions fall": (
        {"digest": DIGEST, "byte_length": 3, "corrections": Corrections(int32([2, 2]), int32([1, 1]))},
        "expected strictly increasing",
    ),
    "position negative": (
        {"digest": DIGEST, "byte_length": 3, "corrections": Corrections(int32([-1]), int32([1]))},
        "expected strictly increasing",
    ),
    "position outside": (
        {"digest": DIGEST, "byte_length": 3, "corrections": Corrections(int32([12]), int32([1]))},
        "expected indices below the document's 12",
    ),
    "token negative": (
        {"digest": DIGEST, "byte_length": 3, "corrections": Corrections(int32([1]), int32([-1]))},
        "corrections.tokens: expected token ids",
    ),
    "token missing": (
        {"digest": DIGEST, "byte_length": 3, "corrections": Corrections(int32([1]), int32([]))},
        "as many tokens as positions",
    ),
    "positions int64": (
        {"digest": DIGEST, "byte_length": 3, "corrections": Corrections(torch.tensor([1]), int32([1]))},
        "corrections.positions: expected an int32 vector",
    ),
}


@pytest.mark.parametrize(("change", "message"), DOCUMENT_FAULTS.values(), ids=DOCUMENT_FAULTS)
def test_validate_names_the_document_that_is_wrong(change, message):
    batch = example()
    batch.documents[0] = replace(batch.documents[0], **change)
    with pytest.raises(ZBatchError, match=f"document 0: .*{message}"):
        batch.validate()


def test_verify_accepts_the_original_alone():
    info = DocumentInfo(1, 2.0, 1, DIGEST, 3)
    info.verify(b"abc")
    with pytest.raises(ExactMismatchError, match="4 bytes"):
        info.verify(b"abcd")
    with pytest.raises(ExactMismatchError, match="got none"):
        DocumentInfo(1, 2.0, 1).verify(b"abc")


def test_a_batch_without_documents_is_valid():
    batch = make_batch([])
    assert len(batch.validate()) == 0
    assert math.isnan(batch.rate)
