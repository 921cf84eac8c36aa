"""Every weighted loss term moves the parameters that it is meant to move, and where stated no others."""

import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch

import ztok_fast
from tests.codec.tiny_codec import packed_documents, tiny_codec
from ztok_fast.train.batches import Section, make_batch
from ztok_fast.train.objective import LossWeights, Objective, Phase, blend_vectors, length_loss, usage_loss

TERMS = [f.name for f in dataclasses.fields(LossWeights)]
NONE = dict.fromkeys(TERMS, 0.0)

COMPRESSOR = (
    "compressor",
    "budget_embedding",
    "end_projection",
    "mean_projection",
    "binding",
    "hidden_gain",
    "embedding_gain",
)
MASS = ("compressor", "budget_embedding", "halting")
DECOMPRESSOR = (
    "decompressor",
    "z_projection",
    "length_embedding",
    "start_embedding",
    "offset_embedding",
    "unbinding",
    "copy_gains",
)
ZSPACE_HEAD = ("inferencer", "zspace", "autoregressive")

# term -> what it moves, what gets no gradient from it
LIVE = {
    "reconstruction": ((*COMPRESSOR, "halting", *DECOMPRESSOR), (*ZSPACE_HEAD, "codebooks")),
    "commitment": (COMPRESSOR, (*DECOMPRESSOR, *ZSPACE_HEAD, "codebooks")),
    "codebook": (("codebooks",), (*COMPRESSOR, "halting", *DECOMPRESSOR, *ZSPACE_HEAD)),
    "length": (MASS, (*DECOMPRESSOR, *ZSPACE_HEAD, "codebooks", "end_projection", "mean_projection", "binding")),
    "usage": ((*COMPRESSOR, "codebooks"), (*DECOMPRESSOR, *ZSPACE_HEAD)),
    "density": (MASS, (*DECOMPRESSOR, *ZSPACE_HEAD, "codebooks", "end_projection", "mean_projection", "binding")),
    "zspace": (
        ("inferencer", "zspace.queries", "zspace.end_row", "zspace.length", "zspace.marks"),
        (*COMPRESSOR, "halting", *DECOMPRESSOR, "codebooks"),
    ),
    "autoregressive": (
        ("compressor", "budget_embedding", "autoregressive"),
        (*DECOMPRESSOR, "inferencer", "zspace", "halting", "codebooks", "binding"),
    ),
    "answer": (("inferencer", "zspace.marks"), (*COMPRESSOR, "halting", *DECOMPRESSOR, "codebooks", "zspace.queries")),
}


@pytest.fixture
def codec():
    return tiny_codec(copy_path=True, emission="stop")


def batch_of(codec, lengths=(40, 23), asked=True):
    documents = packed_documents(codec, list(lengths))
    sections = [Section(d) for d in documents]
    if asked:
        sections[0].question, sections[0].answer = [5, 6, 7], [8, 9]
    return make_batch(sections, codec.config.segment_length)


def run(codec, weights, phase=None, ratios=(3.0, 2.0), **batch):
    return Objective(codec.model, LossWeights(**(NONE | weights)))(
        batch_of(codec, **batch), torch.tensor(ratios), phase or Phase()
    )


def belongs(name: str, groups) -> bool:
    """Whether a parameter is in one of the groups: an adapter's name, or the beginning of its own."""
    return any(name.startswith(g) or (name.startswith("adapters.") and f".{g}." in name) for g in groups)


@pytest.mark.parametrize("term", LIVE)
def test_gradient_of_each_term(codec, term):
    terms, _ = run(codec, {} if term == "reconstruction" else {term: 1.0})
    expected = {"reconstruction", "accuracy", "total"} | ({term} - {"reconstruction"})
    assert set(terms) == expected, "a term of weight 0 is not computed"
    terms[term].backward()
    live, still = LIVE[term]
    seen = set()
    for name, parameter in codec.model.codec_state().items():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        if belongs(name, live):
            assert moved and torch.isfinite(parameter.grad).all(), f"{name} should move"
            seen.add(next(g for g in live if belongs(name, [g])))
        elif belongs(name, still):
            assert not moved, f"{name} should not move"
    assert seen == set(live), "every group names some parameter"
    frozen = [p for n, p in codec.model.named_parameters() if n.startswith("adapted.") and "lora_" not in n]
    assert frozen and all(p.grad is None for p in frozen)


def test_total_is_the_weighted_sum(codec):
    weights = {name: 0.5 + index for index, name in enumerate(TERMS)}
    terms, _ = run(codec, weights)
    expected = terms["reconstruction"] + sum(weights[name] * terms[name] for name in TERMS)
    torch.testing.assert_close(terms["total"], expected)


def test_reconstruction_reaches_the_halting_head_only_with_the_predicted_mass(codec):
    terms, encoded = run(codec, {}, Phase(predicted_mass=False))
    terms["total"].backward()
    assert all(p.grad is None or not p.grad.any() for p in codec.model.halting.parameters())
    predicted = run(codec, {}, Phase(predicted_mass=True))[1]
    assert not torch.equal(encoded.mass, predicted.mass)


def test_quantising_terms_wait_for_the_codebooks(codec):
    weights = dict.fromkeys(TERMS, 1.0)
    terms, _ = run(codec, weights, Phase(blend=0.0))
    assert set(terms) == {"reconstruction", "accuracy", "total", "length", "density"}
    assert "density" not in run(codec, weights, Phase(density=False))[0]
    assert "answer" not in run(codec, weights, asked=False)[0]


def test_blend_goes_from_latents_to_codes(codec):
    _, encoded = run(codec, {})
    latents, codes = encoded.quantized.latents, codec.model.dequantize(encoded.quantized.codes)
    torch.testing.assert_close(blend_vectors(encoded, 0.0), latents)
    torch.testing.assert_close(blend_vectors(encoded, 0.5), (latents + codes) / 2)
    torch.testing.assert_close(blend_vectors(encoded, 1.0), codes)
    weights = torch.randn(codes.shape, generator=torch.Generator().manual_seed(0))
    gradients = [
        torch.autograd.grad(
            (weights * blend_vectors(encoded, b)).sum(), codec.model.mean_projection, retain_graph=True
        )[0]
        for b in (0.0, 0.5, 1.0)
    ]
    for gradient in gradients[1:]:  # straight through, whatever the blend
        torch.testing.assert_close(gradient, gradients[0])
    assert gradients[0].any()


def test_codebooks_do_not_matter_while_latents_are_continuous(codec):
    before = {blend: run(codec, {}, Phase(blend=blend))[0]["reconstruction"].item() for blend in (0.0, 0.5, 1.0)}
    with torch.no_grad():
        codec.model.codebooks.mul_(-1.5)
    after = {blend: run(codec, {}, Phase(blend=blend))[0]["reconstruction"].item() for blend in (0.0, 0.5, 1.0)}
    assert after[0.0] == before[0.0] and after[0.5] != before[0.5] and after[1.0] != before[1.0]


@pytest.fixture
def inputs_seen(codec, monkeypatch):
    """The decompressor's input tokens of every pass."""
    seen = []
    build = codec.model.decoder_inputs

    def record(embeddings, z, tokens, cu_segments):
        seen.append(tokens)
        return build(embeddings, z, tokens, cu_segments)

    monkeypatch.setattr(codec.model, "decoder_inputs", record)
    return seen


def test_noise_swaps_inputs_and_not_targets(codec, inputs_seen):
    run(codec, {}, Phase(noise=0.5, seed=1), lengths=(200, 200))
    true = batch_of(codec, lengths=(200, 200)).tokens
    assert len(inputs_seen) == 1
    assert (inputs_seen[0] != true).float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_scheduled_sampling_puts_in_what_the_model_says(codec, inputs_seen):
    terms, _ = run(codec, {}, Phase(sampling=1.0))
    true, own = inputs_seen
    assert torch.equal(true, batch_of(codec).tokens)
    # The accuracy of the first pass is that of the tokens it wrote.
    first = run(codec, {}, Phase(sampling=0.0))[0]["accuracy"]
    torch.testing.assert_close((own == true).float().mean(), first)
    assert (own != true).any()
    assert torch.isfinite(terms["reconstruction"])
    inputs_seen.clear()
    run(codec, {}, Phase(sampling=0.5, seed=2), lengths=(300, 100))
    differ = (inputs_seen[1] != inputs_seen[0]).float().mean().item()
    assert 0.35 < differ < 0.65


def test_level_dropout_leaves_out_levels_of_whole_segments(codec):
    _, encoded = run(codec, {}, Phase(level_dropout=1.0, seed=3), lengths=(320, 320))
    dropped = encoded.quantized.codes[:, 1] == -1
    assert (encoded.quantized.codes[:, 0] >= 0).all()
    # A segment draws one or two levels with equal probability.
    assert 0.25 < dropped.float().mean() < 0.75
    for first, last in zip(encoded.z.cu_segments.tolist(), encoded.z.cu_segments[1:].tolist()):
        assert len(set(dropped[first:last].tolist())) == 1
    assert not (run(codec, {}, Phase(level_dropout=0.0))[1].quantized.codes == -1).any()


def test_draws_follow_the_seed_alone(codec, inputs_seen):
    phase = Phase(noise=0.3, sampling=0.3, level_dropout=0.5, seed=4)
    one, two, other = (run(codec, {}, p)[0]["total"].item() for p in (phase, phase, dataclasses.replace(phase, seed=5)))
    assert one == two != other


def test_length_loss_is_zero_at_the_budget():
    ratio = torch.tensor([4.0, 2.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    mass = torch.tensor([0.1, 0.4, 0.25, 0.25, 0.2, 0.8])
    assert length_loss(mass, group, ratio).item() == pytest.approx(0.0, abs=1e-12)
    assert length_loss(mass + 0.1, group, ratio).item() == pytest.approx(0.01)


def test_usage_loss_is_least_for_even_use():
    codebooks = 4 * torch.eye(4)[None]
    even = codebooks[0].repeat(5, 1)
    uneven = torch.cat([even[:8], codebooks[0, :1].expand(12, 4)])
    collapsed = codebooks[0, :1].expand(20, 4)
    noise = 0.1 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    losses = [usage_loss(latents + noise, codebooks).item() for latents in (even, uneven, collapsed)]
    assert 0 <= losses[0] < 0.01 < losses[1] < losses[2] == pytest.approx(math.log(4), abs=0.05)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", True])
def test_bad_weights_are_named(value):
    with pytest.raises(ValueError, match="loss weight usage: expected a finite number of at least 0"):
        LossWeights(usage=value)


def test_terms_and_gradients_are_those_of_the_reference_backends():
    found = {}
    for name in ("default", "reference"):
        codec = tiny_codec(copy_path=True, emission="stop")
        with nullcontext() if name == "default" else ztok_fast.backend("reference"):
            terms, encoded = run(codec, dict.fromkeys(TERMS, 1.0))
            terms["total"].backward()
        found[name] = terms, encoded.quantized.codes, {n: p.grad for n, p in codec.model.codec_state().items()}
    (terms, codes, gradients), (expected_terms, expected_codes, expected) = found.values()
    assert torch.equal(codes, expected_codes)
    torch.testing.assert_close(terms, expected_terms)
    for name, gradient in expected.items():
        if gradient is not None:
            scale = float(gradient.abs().max()) + 1e-12
            torch.testing.assert_close(gradients[name] / scale, gradient / scale, atol=1e-4, rtol=1e-4, msg=name)
