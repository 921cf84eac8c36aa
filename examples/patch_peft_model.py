"""Run the LoRA layers of a PEFT model through `ops.lora_linear`: same results, one op per layer.

    python examples/patch_peft_model.py

The model is a tiny random Llama, so that nothing is downloaded. Any model with `peft.tuners.lora.Linear` layers works
the same way.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import ztok_fast


def tiny_model() -> torch.nn.Module:
    """A random Llama of two layers with a LoRA adapter on every linear layer."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def main() -> tuple[float, float]:
    """Compare logits, then train one step inside the patch; returns the loss before and after."""
    model = tiny_model()
    tokens = torch.randint(0, 64, (2, 16))
    with torch.no_grad():
        expected = model(tokens).logits
        with ztok_fast.patch(model) as patch:
            print(patch)  # how many layers are patched; patch.kept names those that keep PEFT's, with reasons
            logits = model(tokens).logits
        restored = model(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(restored, expected), "after the block the model is what it was, bit for bit"

    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    with ztok_fast.patch(model):
        before = model(tokens, labels=tokens).loss
        before.backward()
        optimiser.step()
        after = model(tokens, labels=tokens).loss
    print(f"loss {float(before):.4f} before and {float(after):.4f} after one training step")
    return float(before), float(after)


if __name__ == "__main__":
    main()
