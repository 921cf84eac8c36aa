"""Switching adapters: nothing is done twice, and nothing is left frozen."""

import pytest
import torch

from tests.codec.tiny_codec import tiny_codec
from ztok_fast.codec.adapters import ADAPTERS


@pytest.fixture
def adapted():
    return tiny_codec().model.adapted


def layers(adapted):
    return [module for module in adapted.peft.modules() if hasattr(module, "lora_A")]


def all_trainable(adapted):
    return all(parameter.requires_grad for _, parameter in adapted.adapter_parameters())


def test_the_active_adapter_is_not_switched_to_again(adapted, monkeypatch):
    adapted.activate("decompressor")
    switched = []
    for layer in layers(adapted):
        monkeypatch.setattr(layer, "set_adapter", lambda name: switched.append(name))
    adapted.activate("decompressor")
    assert not switched
    adapted.activate("inferencer")
    assert switched and set(switched) == {"inferencer"}


def test_one_that_was_switched_behind_its_back_is_switched_back(adapted):
    adapted.activate("compressor")
    adapted.peft.set_adapter("inferencer")
    adapted.activate("compressor")
    assert all(layer.active_adapters == ["compressor"] for layer in layers(adapted)) and all_trainable(adapted)


@pytest.mark.parametrize("name", ADAPTERS)
def test_all_adapters_train_after_a_pass_of_the_bare_base(adapted, name):
    adapted.activate(name)
    embeds, cu = torch.randn(4, adapted.hidden_size), torch.tensor([0, 4], dtype=torch.int32)
    adapted(embeds, torch.arange(4), cu, 4, adapter=None)
    assert not all_trainable(adapted)  # PEFT's doing, which the next switch has to make good
    adapted(embeds, torch.arange(4), cu, 4, adapter=name)
    assert all_trainable(adapted)
