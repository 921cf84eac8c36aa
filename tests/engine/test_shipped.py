"""The base model that ships, under the adapters of its codec: the bits of the oracle, and close to the float path."""

import numpy as np
import pytest
import torch

from tests.engine.conftest import instruction_sets
from tests.engine.models import oracle_of
from tests.engine.test_engine import random_rows, random_schedule, read_in_parts
from ztok_fast import ZTokCodec
from ztok_fast.engine import Engine

pytestmark = pytest.mark.slow
ADAPTERS = (None, "compressor", "decompressor", "inferencer")


@pytest.fixture(scope="module")
def codec() -> ZTokCodec:
    return ZTokCodec.from_pretrained("ztok-mini")


def made(codec, precision):
    engine = Engine.from_model(codec.model.adapted.peft, ADAPTERS, precision, slots=4, capacity=160, cache=False)
    engine.keys.fill_(torch.nan)
    engine.values.fill_(torch.nan)
    return engine


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_a_row_has_the_oracles_bits(codec, precision, machine):
    engine, draw = made(codec, precision), torch.Generator().manual_seed(1)
    lengths = [18, 3, 9, 1]
    rows = [row[:3] for row in random_rows(draw, lengths, engine.settings.vocabulary, engine.settings.hidden, True, 1)]
    rows = [(tokens, positions, vectors * 0.05, b) for b, (tokens, positions, vectors) in enumerate(rows)]
    expected = [
        oracle_of(codec.model.adapted.peft, precision, ADAPTERS[variant]).forward(
            tokens.numpy(), vectors.numpy(), positions.numpy()
        )
        for tokens, positions, vectors, variant in rows
    ]
    for isa in instruction_sets():
        machine(isa, 2)
        for largest in (1, 5, 18):
            got = read_in_parts(engine, rows, random_schedule(draw, lengths, largest), [2, 0, 3, 1])
            for one, other in zip(got, expected, strict=True):
                assert np.array_equal(one.numpy(), other), (isa, largest)


@pytest.mark.parametrize(("precision", "least"), [("int8", 0.9), ("float32", 0.999)])
def test_close_to_the_float_path(codec, precision, least):
    """The token that the model prefers, at each place of a text, under the bare model and its adapters."""
    engine = made(codec, precision)
    tokens = torch.tensor(
        codec.tokenizer("The lazy dog did not see that a fox came over the hill. " * 8)["input_ids"][:128]
    )
    cu_rows, slot, start = torch.tensor([0, len(tokens)]).int(), torch.tensor([0]).int(), torch.tensor([0]).int()
    for variant, name in enumerate(ADAPTERS):
        hidden = engine.forward(tokens, torch.arange(len(tokens)), cu_rows, slot, start, torch.tensor([variant]).int())
        ours = engine.logits(hidden)
        with torch.no_grad():
            embeds = codec.model.adapted.embedding(tokens)
            float_hidden = codec.model.adapted(embeds, torch.arange(len(tokens)), cu_rows, len(tokens), adapter=name)
            theirs = codec.model.adapted.logits(float_hidden)
        assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= least, name
        assert (ours - theirs).norm() / theirs.norm() < (1e-5 if precision == "float32" else 0.03), name
