"""A tiny codec of slots, and texts of which its decompressor guesses a part."""

import torch

from tests.codec.tiny_codec import packed_documents, tiny_base, tiny_codec
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.layout import offsets
from ztok_fast.codec.passes import decompress_documents, pack_tokens
from ztok_fast.codec.slots import fill_slots

SEGMENT = 16
VOCABULARY = tiny_base().model.get_input_embeddings().weight.shape[0]
SLOTS = {"emission": "slots", "codebook_size": VOCABULARY, "max_unit_length": SEGMENT, "segment_length": SEGMENT}
TEXTS = ["a small text to learn a few merges from", "the text is small; as small texts go, it is the text", "", "a"]


def tiny_slot_codec() -> ZTokCodec:
    """A random model guesses anew whatever it is told; told softly, it keeps some of its guesses."""
    codec = tiny_codec(seed=3, **SLOTS)
    with torch.no_grad():
        for parameter in (codec.model.slot_gates, codec.model.slot_places.weight, codec.model.ahead_places):
            parameter.mul_(0.05)
    return codec


def guessable_texts(codec) -> list[list[int]]:
    """Texts of which the model guesses a good part: what it writes itself around some random tokens."""
    model, documents = codec.model, packed_documents(codec, [64, 40, 16, 5], seed=3)
    codec._engines.use()
    tokens = pack_tokens(documents, model.device)
    cu = offsets(torch.tensor([16, 16, 16, 16, 16, 16, 8, 16, 5]))
    told = torch.rand(len(tokens), generator=torch.Generator().manual_seed(1)) < 0.3
    cu_documents = torch.tensor([0, 4, 7, 8, 9], dtype=torch.int32)
    z = fill_slots(tokens, told, cu, cu_documents, codec.config.num_codebooks)
    return [own.tolist() for own in decompress_documents(model, z)]
