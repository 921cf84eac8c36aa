"""Generate text with the inference engine: continuous batching, LoRA adapters in one batch, and steps by hand.

    python examples/engine_generate.py

The model is a tiny random Llama, so that nothing is downloaded. Any Llama, Mistral, Qwen2 or Qwen3 of transformers
works the same way, with PEFT adapters or without.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ztok_fast.engine import Engine


def tiny_model() -> torch.nn.Module:
    """A random Llama of two layers with a LoRA adapter named "style"."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    )
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(base, config, adapter_name="style")


def main() -> list[list[int]]:
    """Continue six prompts in three slots; returns the new tokens of each."""
    engine = Engine.from_model(tiny_model(), adapters=("base", "style"), slots=3, capacity=64, cache=False)
    prompts = [[1, 5, 9], [7], [3, 3, 3, 3], [20, 21], [40], [2, 4, 6, 8]]
    adapters = ["base", "style"] * 3

    # Six prompts share three slots: each enters when another has ended.
    texts = engine.generate(prompts, max_new_tokens=12, adapter=adapters)
    for prompt, adapter, text in zip(prompts, adapters, texts):
        print(f"{adapter:>5} {prompt} -> {text}")

    # A prompt's text does not depend on what ran beside it.
    assert engine.generate([prompts[4]], 12, adapter=adapters[4]) == [texts[4]]

    # Seeded draws; a draw depends on the seed, the prompt's row id and the number of tokens before.
    drawn = engine.generate(prompts, 12, adapters, temperature=0.8, top_p=0.9, seed=1)
    assert engine.generate(prompts[2:3], 12, adapters[2], temperature=0.8, top_p=0.9, seed=1, row_ids=[2]) == drawn[2:3]

    # By hand: read a prompt, then choose tokens yourself. One pass over all tokens has the same bits as steps.
    sequences = engine.prefill([prompts[0]], "style")
    for token in (10, 11, 12):
        engine.step(sequences, torch.tensor([token]))
    at_once = engine.prefill([[*prompts[0], 10, 11, 12]], "style")
    assert torch.equal(engine.logits(sequences.hidden), engine.logits(at_once.hidden))
    print("steps and one pass give the same logits, bit for bit")
    engine.release(sequences)
    engine.release(at_once)
    return texts


if __name__ == "__main__":
    main()
