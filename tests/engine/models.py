"""Small random models of every family that the engine runs, with adapters, and their oracles."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.engine.oracle import Oracle, frequencies

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_model(family="llama", seed=0, adapters=(), dtype=torch.float32, **settings):
    """A random model in evaluation mode; biases and norms are random too. With adapters it is a PEFT model."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**(SIZES | settings))).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        if "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            tensor.normal_(std=0.3)
    model = model.to(dtype)
    if not adapters:
        return model
    # Each adapter has its own targets, so that variants share some weights and not others.
    targets = (["q_proj", "down_proj"], ["v_proj", "o_proj", "gate_proj", "up_proj"], ["k_proj"])
    peft = None
    for index, name in enumerate(adapters):
        lora = LoraConfig(
            r=index + 2, lora_alpha=3, target_modules=targets[index % 3], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        if peft is None:
            peft = get_peft_model(model, lora, adapter_name=name)
        else:
            peft.add_adapter(name, lora)
    return peft.eval().requires_grad_(False)


def oracle_of(model, precision="int8", adapter=None) -> Oracle:
    """The oracle of a model under one of its adapters."""
    lora = {}
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    weights = {}
    for name, value in bare.state_dict().items():
        if ".lora_" not in name:
            weights[name.replace(".base_layer", "")] = value.float().numpy()
    for name, module in bare.named_modules():
        if adapter is not None and hasattr(module, "lora_A") and adapter in module.lora_A:
            A, B = (part[adapter].weight.detach().float().numpy() for part in (module.lora_A, module.lora_B))
            lora[name + ".weight"] = (A, B, module.scaling[adapter])
    config = bare.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Oracle(
        weights,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        width,
        config.rms_norm_eps,
        np.array(frequencies(width, config.rope_parameters["rope_theta"])),
        precision,
        lora,
    )
