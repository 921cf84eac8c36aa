"""What is read of a Hugging Face model, and the reasons why one is refused."""

import mpmath
import numpy as np
import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.engine.models import FAMILIES, random_model
from tests.engine.oracle import frequencies as by_mpmath
from ztok_fast.engine import architecture
from ztok_fast.engine.architecture import EngineUnsupported


def test_settings_and_tensors():
    model = random_model("qwen3", tie_word_embeddings=False)
    found = architecture.read(model)
    s = found.settings
    assert (s.kind, s.layers, s.hidden, s.heads, s.kv_heads, s.head_width) == ("Qwen3ForCausalLM", 2, 32, 4, 2, 16)
    assert (s.intermediate, s.vocabulary, s.eps, s.head_norm, s.window) == (48, 50, 1e-6, True, None)
    assert found.adapters == ("base",)
    names = {name for name, _ in found.tensors()}
    assert len(names) == 3 + 2 * 11 and "1.query_norm" in names
    assert found.head.data_ptr() == model.lm_head.weight.data_ptr() != found.embeddings.data_ptr()
    assert found.layers[1].down.weight.data_ptr() == model.model.layers[1].mlp.down_proj.weight.data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read(family):
    found = architecture.read(random_model(family))
    has_bias = [p.bias is not None for p in found.layers[0].projections()]
    assert has_bias == [family == "qwen2"] * 3 + [False] * 4
    assert (found.layers[0].query_norm is not None) == (family == "qwen3")


def test_adapters_by_name():
    model = random_model(adapters=("first", "second"))
    found = architecture.read(model, ("second", None, "first"))
    assert found.adapters == ("second", "base", "first")
    layer = found.layers[0]
    assert set(layer.query.folds) == {"first"} and set(layer.value.folds) == {"second"} and not layer.key.folds
    assert layer.value.folds["second"].scale == 1.0 and layer.query.folds["first"].A.shape == (2, 32)
    assert architecture.read(model).adapters == ("base",) == architecture.read(model, "base").adapters
    assert architecture.read(model, "first").adapters == ("first",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("third",), "of \\['base', 'first'\\], got 'third'"),
        (("first", "first"), "each name once"),
        ((None, "base"), "each name once"),
        ((), "one or more"),
        ((3,), "got 3"),
    ],
)
def test_adapters_that_are_not_there(names, message):
    with pytest.raises(ValueError, match=message):
        architecture.read(random_model(adapters=("first",)), names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "gelu"}, "activation: expected silu, got gelu"),
        ({"head_dim": 8}, "head width: expected a multiple of 16, got 8"),
        ({"intermediate_size": 40}, "intermediate size: expected a multiple of 16, got 40"),
        ({"hidden_size": 24}, "hidden size: expected a multiple of 16, got 24"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "rope type: expected default, linear or llama3, got yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor: expected 1, got 0.5",
        ),
    ],
)
def test_settings_that_are_not_supported(settings, message):
    with pytest.raises(EngineUnsupported, match=message):
        architecture.read(random_model(**settings))


def test_other_models():
    other = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=16, n_layer=1, n_head=1))
    with pytest.raises(EngineUnsupported, match="one of LlamaForCausalLM, .* got .*GPT2LMHeadModel"):
        architecture.read(other)

    class LlamaForCausalLM(type(random_model())):
        """One that may compute anything."""

    mine = random_model()
    mine.__class__ = LlamaForCausalLM
    with pytest.raises(EngineUnsupported, match="model class"):
        architecture.read(mine)


def test_modules_that_are_not_supported():
    def refuses(change, message, **settings):
        model = random_model(**settings)
        change(model)
        with pytest.raises(EngineUnsupported, match=message):
            architecture.read(model, None if not hasattr(model, "peft_config") else "first")

    def exchange(model):
        model.model.layers[1].mlp.up_proj = torch.nn.Identity()

    def merge(model):
        model.merge_adapter(["first"])

    refuses(exchange, "layer 1, up_proj: expected torch.nn.Linear, got torch.nn.modules.linear.Identity")
    refuses(merge, r"no merged adapter, got \['first'\] merged", adapters=("first",))
    refuses(lambda model: model.double(), "dtype: expected float32, bfloat16, float16, got torch.float64")
    refuses(lambda model: model.to("meta"), "device: expected the CPU .* got meta")
    refuses(lambda model: setattr(model.lm_head, "bias", model.model.norm.weight), "head: expected one without a bias")
    refuses(lambda model: setattr(model.model, "norm", torch.nn.LayerNorm(32)), "final norm: expected RMSNorm")
    refuses(lambda model: setattr(model.model.norm, "variance_epsilon", 0.5), "epsilon of final norm: expected 1e-06")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "expected plain LoRA, got Dora"),
        ({"lora_bias": True}, "expected one without a bias"),
        ({"target_modules": ["embed_tokens"]}, "embedding: expected torch.nn.Embedding"),
        ({"target_modules": ["lm_head"]}, "head: expected torch.nn.Linear"),
        ({"modules_to_save": ["norm"]}, "input_layernorm: expected RMSNorm"),
    ],
)
def test_adapters_that_are_not_supported(settings, message):
    config = peft.LoraConfig(**({"r": 2, "target_modules": ["q_proj"]} | settings))
    model = peft.get_peft_model(random_model(tie_word_embeddings=False), config)
    with pytest.raises(EngineUnsupported, match=message):
        architecture.read(model, "default")


def test_other_adapters_than_lora():
    model = peft.get_peft_model(random_model(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(EngineUnsupported, match="adapter of layer 0, k_proj: expected LoRA, got peft.tuners.ia3"):
        architecture.read(model)


def test_a_sliding_window_limits_the_rows():
    assert architecture.read(random_model("mistral", sliding_window=100)).settings.window == 100
    assert architecture.read(random_model("mistral", sliding_window=None)).settings.window is None
    qwen = {"use_sliding_window": True, "sliding_window": 60}
    assert architecture.read(random_model("qwen2", max_window_layers=1, **qwen)).settings.window == 60
    assert architecture.read(random_model("qwen2", max_window_layers=2, **qwen)).settings.window is None


@pytest.mark.parametrize("base", [10000.0, 500000.0, 1e6, 12345.678])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_frequencies_are_correctly_rounded(base, width):
    found = architecture.frequencies(width, {"rope_type": "default", "rope_theta": base})
    assert np.array_equal(np.array(found, np.float32), by_mpmath(width, base))


def test_frequencies_of_longer_contexts():
    default = architecture.frequencies(64, {"rope_type": "default", "rope_theta": 1e4})
    linear = architecture.frequencies(64, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    assert linear == tuple(value / 4 for value in default)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = random_model(rope_parameters=rope, head_dim=64)
    found = np.array(architecture.read(model).settings.frequencies)
    np.testing.assert_allclose(found, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert found[0] == 1 and found[-1] < by_mpmath(64, 500000.0)[-1] / 7


def test_nearest_float_rounds_once():
    import decimal

    with decimal.localcontext() as context:
        context.prec = 60
        half = decimal.Decimal(1) + decimal.Decimal(2) ** -24  # between two floats, the lower of which is even
        tiny = decimal.Decimal(2) ** -80  # binary64 does not see it beside 1
        assert [architecture.nearest_float(half + d) for d in (-tiny, 0 * tiny, tiny)] == [1, 1, 1 + 2**-23]
        odd = half + decimal.Decimal(2) ** -23
        assert [architecture.nearest_float(odd + d) for d in (-tiny, 0 * tiny, tiny)] == [
            1 + 2**-23,
            1 + 2**-22,
            1 + 2**-22,
        ]
    with mpmath.workprec(24):
        assert architecture.nearest_float(decimal.Decimal("0.1")) == float(+mpmath.mpf("0.1"))
