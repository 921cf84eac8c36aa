"""`ztok_fast.patch`: PEFT's LoRA layers through `ops.lora_linear`, and everything back afterwards."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import ztok_fast
from tests.ops.tolerances import TOLERANCES
from ztok_fast import peft_lora
from ztok_fast.codec.adapters import AdaptedBase
from ztok_fast.codec.config import ZTokConfig

VOCAB = 61
SIZES = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=48),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, intermediate_size=48, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, intermediate_size=48),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, intermediate_size=48, head_dim=8),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4),
}
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"]}


def lora_config(family="llama", **settings):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS.get(family, "all-linear"), **settings}
    return LoraConfig(**settings, init_lora_weights=False, fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM")


def adapted(family="llama", adapters=("default",), dtype=torch.float32, **settings):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).to(dtype)
    first, *others = adapters
    model = get_peft_model(base, lora_config(family, **settings), adapter_name=first, autocast_adapter_dtype=False)
    for name in others:
        model.add_adapter(name, lora_config(family, **settings), autocast_adapter_dtype=False)
    return model.eval()


def tokens(batch=3, length=7):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch):
    """What `ops.lora_linear` was called with by patched layers."""
    seen = []

    def spy(*args):
        seen.append(args)
        return ztok_fast.ops.lora_linear(*args)

    monkeypatch.setattr(peft_lora, "lora_linear", spy)
    return seen


def assert_close(actual, expected, dtype=torch.float32, scale=10.0):
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol * scale, atol=atol * scale)


def check_logits(model, calls, dtype=torch.float32, **kwargs):
    """Logits inside the block agree with PEFT's, those after it are the same bits."""
    with torch.no_grad():
        before = model(tokens(), **kwargs).logits
        with ztok_fast.patch(model) as patch:
            calls.clear()
            inside = model(tokens(), **kwargs).logits
        assert patch.kept == {} and patch.patched == []
        after = model(tokens(), **kwargs).logits
    assert_close(inside, before, dtype)
    assert torch.equal(after, before)
    return inside


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_of_every_family(family, calls):
    model = adapted(family)
    check_logits(model, calls)
    assert len(calls) == sum(type(m).__name__ == "Linear" and hasattr(m, "lora_A") for m in model.modules()) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_logits_of_every_dtype(dtype, calls):
    check_logits(adapted(dtype=dtype), calls, dtype)
    assert calls


def test_float32_adapters_on_a_bfloat16_base(calls):
    model = adapted(dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    check_logits(model, calls, torch.bfloat16)
    assert calls


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients(family, calls):
    model = adapted(family)

    def gradients():
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    with ztok_fast.patch(model):
        inside = gradients()
    assert calls and before.keys() == inside.keys() and all("lora_" in name for name in before)
    for name in before:
        assert_close(inside[name], before[name])
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients().items())


def test_generation(calls):
    model = adapted()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens(1), **settings)
    with ztok_fast.patch(model):
        assert torch.equal(model.generate(tokens(1), **settings), expected)
    assert min(args[0].shape[0] for args in calls) == 1


def test_adapters_are_switched_disabled_scaled_merged_and_added_within_the_block(calls):
    model, twin = adapted(adapters=("one", "two")), adapted(adapters=("one", "two"))
    twin.load_state_dict(model.state_dict())

    def same(called=True):
        calls.clear()
        with torch.no_grad():
            assert_close(model(tokens()).logits, twin(tokens()).logits)
        assert bool(calls) == called

    with ztok_fast.patch(model) as patch:
        same()
        for m in (model, twin):
            m.set_adapter("two")
        same()
        with model.disable_adapter(), twin.disable_adapter():
            same(called=False)
        for m in (model, twin):
            for module in m.modules():
                if hasattr(module, "lora_A"):
                    module.scaling["two"] = 0.25
        same()
        for m in (model, twin):
            m.merge_adapter()
        same(called=False)
        for m in (model, twin):
            m.unmerge_adapter()
        same()
        for m in (model, twin):
            torch.manual_seed(5)
            m.add_adapter("three", lora_config())
            m.set_adapter("three")
        same()
        assert patch.kept == {}


def test_adapters_mixed_in_a_batch(calls):
    model = adapted(adapters=("one", "two", "three"))
    check_logits(model, calls, adapter_names=["three", "__base__", "one"])
    assert calls and all(args[-1] is not None and args[3].shape[0] == 2 for args in calls)
    with ztok_fast.patch(model), pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(tokens(), adapter_names=["one"])


def test_the_codecs_own_adapters(calls):
    base = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]))
    settings = ZTokConfig(base_model="tiny", segment_length=8, compressor_layers=1, lora_rank=4, lora_alpha=4)
    model = AdaptedBase(base, settings)
    for name, parameter in model.adapter_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    embeds = torch.randn(9, 32)
    inputs = (embeds, torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3]), torch.tensor([0, 5, 9], dtype=torch.int32), 5)

    def outputs():
        with torch.no_grad():
            return [model(*inputs, adapter=name) for name in ("compressor", "decompressor", "inferencer", None)]

    patched = outputs()
    assert calls
    calls.clear()
    model.patch.undo()
    own = outputs()
    assert not calls
    for actual, expected in zip(patched, own, strict=True):
        assert_close(actual, expected)
    model.patch = ztok_fast.patch(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(), patched, strict=True))


KEPT = {
    "dropout": ({"lora_dropout": 0.1}, "dropout in training mode"),
    "dora": ({"use_dora": True}, "is a variant .DoraLinearVariant"),
    "bias": ({"lora_bias": True}, "has a bias"),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_lora_linear_cannot_do_keeps_pefts_forward_and_says_so(case, calls):
    settings, reason = KEPT[case]
    model = adapted(**settings).train()
    torch.manual_seed(2)
    expected = model(tokens()).logits
    with pytest.warns(UserWarning, match=f"layers keep .*{reason}"):
        patch = ztok_fast.patch(model)
    with patch:
        assert set(patch.kept) == set(patch.patched) and len(patch.kept) > 0
        torch.manual_seed(2)
        assert torch.equal(model(tokens()).logits, expected)
    assert not calls


def test_dropout_outside_training_is_none(calls):
    check_logits(adapted(lora_dropout=0.5), calls)
    assert calls


def test_a_state_that_comes_later_is_warned_of_once(calls):
    model = adapted(lora_dropout=0.1)
    with ztok_fast.patch(model) as patch:
        assert patch.kept == {}
        model.train()
        assert len(patch.kept) == len(patch.patched)
        with pytest.warns(UserWarning, match="dropout in training mode") as caught:
            model(tokens())
            model(tokens())
        assert len(caught) == 1
    assert not calls


def test_several_active_adapters_keep_pefts_forward():
    model = adapted(adapters=("one", "two"))
    model.base_model.set_adapter(["one", "two"])
    expected = model(tokens()).logits
    with pytest.warns(UserWarning, match="2 adapters are active"), ztok_fast.patch(model):
        assert torch.equal(model(tokens()).logits, expected)


def test_hooks_inside_a_layer_are_not_passed_over():
    model = adapted()
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    seen = []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="a layer keeps .* hooks"), ztok_fast.patch(model) as patch:
        assert len(patch.kept) == 1
        model(tokens())
    assert seen == [1]


def test_lora_layers_of_another_kind_are_reported():
    with pytest.warns(UserWarning, match="no replacement for Embedding"):
        patch = ztok_fast.patch(adapted(target_modules=["embed_tokens", "q_proj"]))
    with patch:
        assert [name.rsplit(".", 1)[-1] for name in patch.kept] == ["embed_tokens"]
        assert len(patch.patched) == 2


def test_patching_twice_is_an_error_and_undoing_twice_is_not():
    model = adapted()
    patch = ztok_fast.patch(model)
    with pytest.raises(ValueError, match="must not be patched already, but '.*' is"):
        ztok_fast.patch(model)
    with pytest.raises(ValueError, match="must not be patched already"):
        ztok_fast.patch(nn.ModuleList([model]))
    with pytest.raises(RuntimeError, match="cannot be copied"):
        copy.deepcopy(model)
    patch.undo()
    patch.undo()
    with ztok_fast.patch(model):
        pass
    copy.deepcopy(model)


def test_a_later_replacement_is_not_undone_along():
    model = adapted()
    with pytest.raises(RuntimeError, match="something replaced the forward pass of '.*' since"), ztok_fast.patch(model):
        layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
        ours = layer.forward
        layer.forward = lambda *args, **kwargs: ours(*args, **kwargs)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("llama", "model must be a torch.nn.Module, got str"),
        (nn.Linear(2, 2), "model must have a layer of class peft.tuners.lora.layer.Linear, got a Linear without one"),
    ],
)
def test_bad_input(model, message):
    with pytest.raises(ValueError, match=f"patch: {message}"):
        ztok_fast.patch(model)


def test_no_warning_where_all_layers_are_patched():
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ztok_fast.patch(model) as patch:
            assert "0 of all kept" in repr(patch)


def test_other_models_are_left_alone(calls):
    patched, other = adapted(), adapted()
    with ztok_fast.patch(patched):
        other(tokens())
    assert not calls


def test_gradients_after_inference_mode():
    """What a layer keeps from a call in inference mode serves one with gradients."""
    model = adapted()
    with ztok_fast.patch(model):
        with torch.inference_mode():
            before = model(tokens()).logits.clone()
        after = model(tokens()).logits
        after.sum().backward()
    torch.testing.assert_close(after, before)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
