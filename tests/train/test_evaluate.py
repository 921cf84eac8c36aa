"""Evaluation, against the same numbers reached another way."""

import math

import pytest
import torch

from tests.codec.tiny_codec import packed_documents, tiny_causal_lm, tiny_codec
from tests.train.tiny_run import write_corpus
from ztok_fast.codec.passes import compress_documents, decompress_documents, teacher_forced
from ztok_fast.train.evaluate import _correlation, dev_documents, evaluate


@pytest.fixture(scope="module")
def codec():
    return tiny_codec()


@pytest.fixture(scope="module")
def documents(codec):
    return packed_documents(codec, [50, 17, 64])


def test_report_equals_compressing_and_decompressing(codec, documents):
    report = evaluate(codec, documents, [2, 4.0])
    assert set(report) == {"base", "2", "4"}
    for budget in (2.0, 4.0):
        z = compress_documents(codec.model, documents, budget)
        written = decompress_documents(codec.model, z)
        flat = torch.tensor([t for d in documents for t in d])
        predicted, _, losses = teacher_forced(codec.model, z, flat)
        free = torch.tensor([t for w in written for t in w])
        own = report[f"{budget:g}"]
        assert own["free_running"] == pytest.approx((free == flat).float().mean().item())
        assert own["teacher_forced"] == pytest.approx((predicted == flat).float().mean().item())
        assert own["ratio"] == 131 / z.ztokens and own["rate"] == z.ztokens * (2 * 4 + 3) / 131
        assert own["loss_bits"] == pytest.approx(losses.mean().item() / math.log(2), rel=1e-4)
        assert -1 <= own["length_surprisal_correlation"] <= 1


def test_bits_of_the_base_are_those_of_transformers(codec, documents):
    model = tiny_causal_lm("llama", len(codec.model.adapted.embedding.weight))
    losses, hits = [], []
    for document in documents:
        for start in range(0, len(document), 16):
            segment = torch.tensor(document[start : start + 16])[None]
            if segment.shape[1] < 2:
                continue
            with torch.no_grad():
                logits = model(segment[:, :-1]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, segment[0, 1:], reduction="none"))
            hits.append((logits.argmax(-1) == segment[0, 1:]).float())
    base = evaluate(codec, documents, [4])["base"]
    assert base["bits_per_token"] == pytest.approx(torch.cat(losses).mean().item() / math.log(2), rel=1e-4)
    assert base["accuracy"] == pytest.approx(torch.cat(hits).mean().item(), abs=1e-6)


def test_batches_levels_latents_and_fixed_units(codec, documents):
    whole = evaluate(codec, documents, [3])["3"]
    split = evaluate(codec, documents, [3], batch_tokens=20)["3"]
    for name in ("teacher_forced", "free_running", "ratio", "rate", "loss_bits"):
        assert split[name] == pytest.approx(whole[name], rel=1e-3), name
    one = evaluate(codec, documents, [3], levels=1)["3"]
    assert one["rate"] == pytest.approx(whole["rate"] * 7 / 11) and one["ratio"] == whole["ratio"]
    continuous = evaluate(codec, documents, [3], quantized=False)["3"]
    assert continuous["loss_bits"] != whole["loss_bits"] and continuous["ratio"] == whole["ratio"]
    fixed = evaluate(codec, [documents[2]], [4], fixed_units=True)["4"]
    assert fixed["ratio"] == 4.0 and fixed["length_surprisal_correlation"] == 0.0


def test_documents_longer_than_a_section_are_cut(codec):
    long = packed_documents(codec, [100])
    assert evaluate(codec, long, [4]) == evaluate(codec, [long[0][:64]], [4])


def test_bad_arguments(codec, documents):
    with pytest.raises(ValueError, match="expected at least one document with text"):
        evaluate(codec, [[]], [4])
    with pytest.raises(ValueError, match="ratio: expected between 1 and 8"):
        evaluate(codec, documents, [9])


def test_correlation():
    lengths = torch.tensor([1.0, 2.0, 4.0])
    assert _correlation(lengths, 3 - lengths) == pytest.approx(-1.0)
    assert _correlation(lengths, lengths * 2) == pytest.approx(1.0)
    assert _correlation(lengths, torch.ones(3)) == 0.0


def test_dev_documents_are_spread_over_the_file(tmp_path, codec):
    path = write_corpus(tmp_path / "dev.jsonl", rows=9)
    every = dev_documents([path], codec.tokenizer, 100, 1000)
    assert len(every) == 9
    assert dev_documents([path], codec.tokenizer, 3, 12) == [every[i][:12] for i in (0, 3, 6)]
    assert dev_documents([path], codec.tokenizer, 3, 12, ["source"]) == []
    assert dev_documents([], codec.tokenizer, 3, 12) == []
    with pytest.raises(ValueError, match="evaluation documents: expected at least 1, got 0"):
        dev_documents([path], codec.tokenizer, 0, 12)
