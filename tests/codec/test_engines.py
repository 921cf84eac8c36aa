"""Which runtime a codec uses, and what the engine's promise gives its files."""

import warnings

import pytest
import torch

from tests.codec.tiny_codec import packed_documents, tiny_base, tiny_codec, tiny_config
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.engines import Engines
from ztok_fast.codec.errors import CodecError, EngineFallbackWarning
from ztok_fast.codec.passes import compress_documents, decode_segments, teacher_forced
from ztok_fast.profiling import profile

TEXTS = ["a small text to learn a few merges from", "the text is small; as small texts go, it is the text", "", "a"]


@pytest.fixture(scope="module")
def codec():
    return tiny_codec("llama")


@pytest.fixture
def choose(codec, monkeypatch):
    """Sets what the codec runs its base with."""
    return lambda engine: monkeypatch.setattr(codec._engines, "choice", engine)


def isas():
    before = torch.ops.ztok.isa_native(-1)
    found = []
    for isa in (0, 1, 2):
        if torch.ops.ztok.isa_native(isa) == isa:
            found.append(isa)
    torch.ops.ztok.isa_native(before)
    return found


@pytest.mark.parametrize("engine", ["int8", "float32", "float"])
def test_files_name_the_precision_and_decompress_with_it(codec, choose, tmp_path, engine):
    choose(engine)
    codec.save(codec.compress(TEXTS, exact=True), tmp_path / "x.ztok")
    z = codec.load(tmp_path / "x.ztok")
    assert z.precision == engine == codec.engine
    choose("auto")
    assert codec.decompress(z) == TEXTS


def test_auto_is_the_engine(codec, choose):
    choose("auto")
    assert codec.engine == "int8" and codec.model.engine is not None
    with torch.enable_grad():
        assert codec.model.runtime is codec.model.float_runtime, "gradients come from transformers' modules"


def test_an_exact_document_is_refused_by_another_precision(codec, choose):
    choose("int8")
    z = codec.compress(TEXTS)
    choose("float")
    assert len(codec.decompress(z)) == len(TEXTS), "without exact mode any precision will do"
    z.documents[0].corrections, z.documents[0].digest = Corrections.none_needed(), "0" * 16
    with pytest.raises(
        CodecError, match="expected 'int8', with which the exact documents were compressed, got 'float'"
    ):
        codec.decompress(z)


def test_a_pass_says_what_steps_write(codec, choose):
    """With the engine, the tokens that a text's own steps wrote are those that one pass over the text predicts."""
    choose("int8")
    codec.engine  # noqa: B018
    model = codec.model
    z = compress_documents(model, packed_documents(codec, [61, 5, 30, 16]), 3.0)
    written = decode_segments(model, z)
    flat = torch.tensor([t for segment in written for t in segment])
    assert torch.equal(teacher_forced(model, z, flat)[0], flat)
    # One by one, segments are drafted and verified; the text is the same.
    with profile() as found:
        assert decode_segments(model, z, batch_segments=1) == written
    assert len(found.counters) == len(written)  # one for each that is drafted, not one for each step


def test_a_text_decompresses_the_same_on_every_instruction_set(codec, choose):
    choose("int8")
    codec.engine  # noqa: B018
    model, before = codec.model, torch.ops.ztok.isa_native(-1)
    z = compress_documents(model, packed_documents(codec, [40, 9]), 3.0)
    written, flat = decode_segments(model, z), torch.arange(49) + 3
    losses = teacher_forced(model, z, flat)[2]
    others = [isa for isa in isas() if isa != before]
    assert others
    try:
        for isa in others:
            torch.ops.ztok.isa_native(isa)
            assert decode_segments(model, z) == written
            # The logits too have the same bits, and torch makes the same losses of them.
            assert torch.equal(teacher_forced(model, z, flat)[2], losses)
    finally:
        torch.ops.ztok.isa_native(before)


def test_changed_weights_make_a_new_engine():
    codec = tiny_codec("llama", seed=1)
    before = codec.compress(TEXTS)
    with torch.no_grad():
        for name, parameter in codec.model.adapted.adapter_parameters():
            if "lora_B" in name:
                parameter.mul_(-3)
    after = codec.compress(TEXTS)
    assert not torch.equal(before.codes, after.codes) or not torch.equal(before.unit_lengths, after.unit_lengths)


def test_a_base_that_the_engine_does_not_run_falls_back_aloud():
    codec = tiny_codec("gpt2")
    with pytest.warns(EngineFallbackWarning, match="model class"):
        assert codec.engine == "float"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert codec.engine == "float", "it is said once"
    codec._engines.choice = "int8"
    with pytest.raises(CodecError, match="model class"):
        codec.compress(TEXTS)


def test_unknown_engine_is_refused():
    base = tiny_base()
    with pytest.raises(CodecError, match="engine: expected one of auto, int8, float32, float, got 'fast'"):
        ZTokCodec(base, tiny_config(base), engine="fast")


def test_on_a_gpu_a_codec_keeps_its_float_path():
    """The engine's passes there have not been run on one yet; another device stands for it."""
    elsewhere = type("Model", (), {"device": torch.device("meta"), "engine": None})()
    assert Engines(elsewhere, "auto").use() == "float"
    with pytest.raises(CodecError, match="device of a codec: expected cpu, got meta"):
        Engines(elsewhere, "int8").use()
