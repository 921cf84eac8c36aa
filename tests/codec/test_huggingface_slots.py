"""Codecs of slots without this package's ops: another program with the same definitions gives the same answers."""

import pytest
import torch

from tests.codec.tiny_codec import tiny_base, tiny_codec
from tests.codec.tiny_slots import SEGMENT, SLOTS, guessable_texts
from ztok_fast.codec import huggingface
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.passes import compress_documents, decompress_documents
from ztok_fast.codec.slots import written_tokens
from ztok_fast.codec.zbatch import ZBatch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    codec = tiny_codec(**SLOTS)
    with torch.no_grad():
        # Told softly, a random model keeps some of its guesses.
        own = codec.model
        for parameter in (own.slot_gates, own.slot_places.weight, own.ahead_places, own.ahead_gates):
            parameter.mul_(0.01)
    found = tmp_path_factory.mktemp("codec") / "slots"
    codec.save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def codec(folder):
    codec = ZTokCodec.from_pretrained(folder, base=tiny_base(), engine="float")
    codec._engines.use()
    return codec


@pytest.fixture(scope="module")
def documents(codec):
    return guessable_texts(codec)


@pytest.fixture(scope="module")
def parts(folder):
    return lambda command, merged=False: huggingface.load(
        folder, tiny_base(), huggingface.adapter_of(command, folder), merged, "cpu"
    )


def units(z):
    counts = z.cu_ztokens.diff().tolist()
    return list(zip(*(own.split(counts) for own in (z.unit_lengths, z.codes, z.slot_offsets))))


@pytest.mark.parametrize("ratio", [1, 1.7, 2, 3, 8])
@torch.inference_mode()
def test_both_write_the_same_slots(codec, documents, parts, ratio):
    z = compress_documents(codec.model, documents, ratio)
    # More units than slots ask for change what is guessed.
    assert int((written_tokens(z) < 0).sum()) >= (5 if ratio >= 2 else 1), "some tokens are guessed"
    found = huggingface.compress_tokens(parts("compress"), documents, ratio)
    assert [[own.tolist() for own in one] for one in found] == [[own.tolist() for own in one] for one in units(z)]


@pytest.mark.parametrize(("batched", "merged"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("ratio", [2, 8])
@torch.inference_mode()
def test_both_write_the_same_text(codec, documents, parts, ratio, batched, merged):
    z = compress_documents(codec.model, documents, ratio)
    segments = []
    for index in range(len(z)):
        own = z.part(index)
        counts = own.cu_segments.diff().tolist()
        segments.append(list(zip(*(x.split(counts) for x in (own.unit_lengths, own.codes, own.slot_offsets)))))
    written, _ = huggingface.decompress(parts("decompress", merged), segments, batched)
    assert written == [own.tolist() for own in decompress_documents(codec.model, z)]
    if ratio == 2:
        assert written == documents


@torch.inference_mode()
def test_both_continue_alike(codec, parts):
    z = codec.compress(["a small text to learn a few merges from", "the text is small"], 3)
    new = codec.generate(z, 5, end_threshold=1.0)
    found = huggingface.continue_ztokens(parts("generate"), units(z), 5)
    assert isinstance(new, ZBatch)
    assert [own.tolist() for own in found] == [torch.cat(own[1:], 1).tolist() for own in units(new)]


@pytest.mark.parametrize("ratio", [1.7, 3, 8])
def test_what_is_written_does_not_depend_on_the_batch(codec, documents, ratio):
    together = compress_documents(codec.model, documents, ratio)
    for index, document in enumerate(documents):
        alone = compress_documents(codec.model, [document], ratio)
        assert alone.keys() == together.part(index).keys()


def test_named_tokens_are_those_of_the_package(codec, documents):
    z = compress_documents(codec.model, documents, 2)
    assert torch.equal(huggingface.slots.named_tokens(z.unit_lengths, z.codes, z.slot_offsets), written_tokens(z))
    assert (z.cu_text.diff() <= SEGMENT).all()
