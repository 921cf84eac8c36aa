"""A codec of slots on the small base that ships, untrained: what it restores is its language models' work."""

import pytest
import torch

from ztok_fast.cli.evaluation import SAMPLE
from ztok_fast.codec.base_model import load_base
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.evaluation.evaluate import CODEC, COMPRESSOR, DECOMPRESSOR, IDS, WAYS, compare
from ztok_fast.evaluation.sample import Sample


@pytest.fixture(scope="module")
def rows():
    base = load_base("mini-base")
    vocabulary = len(base.model.get_input_embeddings().weight)
    torch.manual_seed(0)
    codec = ZTokCodec(
        base,
        ZTokConfig(emission="slots", segment_length=64, max_unit_length=64, codebook_size=vocabulary, lora_rank=4),
    )
    sample = Sample.of_texts(codec, [SAMPLE.read_text(encoding="utf-8")[:1000]])
    found = {(row.asked, row.way): row for row in compare(codec, sample, [2.0, 8.0])}
    assert len(found) == 2 * len(WAYS)
    return found


def test_without_either_language_model_less_comes_back(rows):
    for ratio, compressor, decompressor in ((2.0, 0.08, 0.08), (8.0, 0.05, 0.05)):
        accuracy = rows[ratio, CODEC].free_running
        assert rows[ratio, COMPRESSOR].free_running < accuracy - compressor
        assert rows[ratio, DECOMPRESSOR].free_running < accuracy - decompressor


def test_bits_are_counted_the_same_for_all(rows):
    """Untrained, the codec is about as efficient as token ids: only accuracy at the same rate can be compared here."""
    exact = rows[2.0, CODEC]
    assert exact.free_running == exact.exact_segments == 1.0 and exact.rate < exact.vocabulary_bits
    for ratio in (2.0, 8.0):
        own, ids = rows[ratio, CODEC], rows[ratio, IDS]
        assert own.rate - 0.3 < ids.rate <= own.rate and ids.free_running < 1.0
        assert 0 < own.efficiency < 1 and 0 < ids.efficiency < 1
