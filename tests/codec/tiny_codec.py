"""Tiny random base models of four families, and codecs on them with random weights that do something."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.codec.tiny_base import tiny_tokenizer
from ztok_fast.codec.base_model import BaseModel, fingerprint, tokenizer_fingerprint
from ztok_fast.codec.codec import ZTokCodec
from ztok_fast.codec.config import ZTokConfig

FAMILIES = ("llama", "qwen3", "mistral", "gpt2")
HIDDEN = 32


def tiny_causal_lm(family: str, vocab_size: int, seed: int = 0):
    """A random model in evaluation mode; its logits are spread, so that the best one leads by more than rounding."""
    torch.manual_seed(seed)
    shared = {"vocab_size": vocab_size, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        config = GPT2Config(n_positions=128, n_embd=HIDDEN, n_layer=2, n_head=4, **shared)
        return GPT2LMHeadModel(config).eval()
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, **shared)).eval()
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(head_dim=16, **sizes, **shared)).eval()
    return MistralForCausalLM(MistralConfig(head_dim=16, sliding_window=200, **sizes, **shared)).eval()


def tiny_base(family: str = "llama", seed: int = 0) -> BaseModel:
    tokenizer = tiny_tokenizer()
    model = tiny_causal_lm(family, len(tokenizer), seed).requires_grad_(False)
    return BaseModel(model, tokenizer, f"tiny-{family}", fingerprint(model), tokenizer_fingerprint(tokenizer), "test")


def tiny_config(base: BaseModel, **settings) -> ZTokConfig:
    values = {
        "base_model": base.name,
        "base_fingerprint": base.fingerprint,
        "segment_length": 16,
        "section_segments": 4,
        "num_codebooks": 2,
        "codebook_size": 16,
        "latent_dim": 8,
        "max_unit_length": 8,
        "lora_rank": 2,
    }
    return ZTokConfig(**(values | settings))


def tiny_codec(family: str = "llama", seed: int = 0, **settings) -> ZTokCodec:
    """A codec whose adapters, halting and heads are random rather than the zeros they start from."""
    base = tiny_base(family)
    torch.manual_seed(seed)
    codec = ZTokCodec(base, tiny_config(base, **settings))
    with torch.no_grad():
        for name, tensor in codec.model.codec_state().items():
            if "lora_B" in name:
                tensor.normal_(std=0.2)
            elif name in ("codebooks", "zspace.end_row"):
                tensor.normal_()
            elif name in ("halting.out.weight", "budget_embedding"):
                tensor.normal_(std=0.3)
            elif name == "end_projection":
                tensor.normal_(std=HIDDEN**-0.5)
    return codec


def packed_documents(codec: ZTokCodec, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random token documents of these lengths."""
    draw = torch.Generator().manual_seed(seed)
    vocabulary = codec.model.adapted.embedding.weight.shape[0]
    return [torch.randint(3, vocabulary, (n,), generator=draw).tolist() for n in lengths]
