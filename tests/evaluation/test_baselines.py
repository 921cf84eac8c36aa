"""Token ids at a rate, against a loop over segments with transformers' modules."""

import pytest
import torch

from tests.codec.test_selection import SLOTS, VOCABULARY
from tests.codec.tiny_codec import tiny_causal_lm, tiny_codec
from tests.evaluation.test_evaluate import TEXTS
from ztok_fast.codec.slot_coding import encode_tokens
from ztok_fast.evaluation.baselines import coded_text, token_ids, truncation
from ztok_fast.evaluation.sample import Sample


@pytest.fixture(scope="module", params=["float32", "float"])
def sample(request):
    codec = tiny_codec(**SLOTS)
    codec._engines.choice = request.param
    return Sample.of_texts(codec, TEXTS)


def test_ids_fill_the_bits_and_the_base_goes_on(sample):
    bits = 0.5 * sample.vocabulary_bits * len(sample)
    outcome = token_ids(sample, bits)
    told, share = outcome.told, float(outcome.told.double().mean())
    # One token more of every segment would be too many.
    assert outcome.bits <= bits < outcome.bits + 12 * len(sample.cu_segments)
    assert outcome.bits <= outcome.plain_bits == int(told.sum()) * sample.vocabulary_bits
    model = tiny_causal_lm("llama", VOCABULARY)
    for begin, end in zip(sample.cu_segments[:-1].tolist(), sample.cu_segments[1:].tolist()):
        count = int(told[begin:end].sum())
        assert told[begin : begin + count].all() and abs(count - share * (end - begin)) < 2
        assert (outcome.loss[begin : begin + count] == 0).all()
        assert torch.equal(outcome.loss[begin + count : end], sample.own_bits[begin + count : end])
        written = sample.tokens[begin : begin + count]
        if not count:
            assert (outcome.free[begin:end] == -1).all()
            continue
        while len(written) < end - begin:
            with torch.no_grad():
                written = torch.cat([written, model(written[None]).logits[0, -1:].argmax(-1)])
        assert torch.equal(outcome.free[begin:end], written)


def test_truncation_keeps_the_head_of_every_document(sample):
    outcome, at = truncation(sample, 0.4 * sample.vocabulary_bits * len(sample)), 0
    share = float(outcome.told.double().mean())
    assert 0.35 < share < 0.6
    for document in sample.documents:
        own = outcome.told[at : at + len(document)].int()
        assert (own.diff() <= 0).all() and abs(int(own.sum()) - share * len(document)) < 2
        at += len(document)
    assert torch.equal(outcome.free, torch.where(outcome.told, sample.tokens, -1))


def test_coded_text_takes_its_own_bits(sample):
    """From its own bits on a text comes back whole; below, a share of every segment does."""
    own = float(sample.own_bits.double().sum())
    assert coded_text(sample, own + 1e-6).told.all()
    outcome = coded_text(sample, 0.5 * own)
    assert 0.3 * own < outcome.bits == float(sample.own_bits[outcome.told].double().sum()) <= 0.5 * own
    for begin, end in zip(sample.cu_segments[:-1].tolist(), sample.cu_segments[1:].tolist()):
        assert (outcome.told[begin:end].int().diff() <= 0).all()
    assert torch.equal(outcome.free[outcome.told], sample.tokens[outcome.told])
    assert torch.equal(outcome.loss, torch.where(outcome.told, 0.0, sample.own_bits))


@pytest.mark.parametrize("way", [token_ids, truncation, coded_text])
def test_ends_of_the_range(sample, way):
    nothing, everything = way(sample, 0.0), way(sample, 1e9)
    assert not nothing.told.any() and nothing.bits == 0 and (nothing.free == -1).all()
    assert everything.told.all() and torch.equal(everything.free, sample.tokens)
    most = float(sample.own_bits.sum()) if way is coded_text else 8 * len(encode_tokens(sample.tokens, VOCABULARY))
    assert everything.bits <= most + 1e-3
