"""Calls whatever the engine launches on a GPU, on tensors without memory, for `tests/ops/aot.py` to compile."""

import torch

from tests.engine.models import random_model
from ztok_fast.engine import cuda
from ztok_fast.engine.architecture import read
from ztok_fast.engine.weights import pack

NAMES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
SMOLLM2 = dict(zip(NAMES, (576, 1536, 9, 3, 64)))
WIDE = dict(zip(NAMES, (1024, 3072, 16, 2, 128)))
SHAPES = (("llama", "int8", SMOLLM2), ("qwen3", "int8", WIDE), ("qwen2", "float32", SMOLLM2))


def launch_all():
    """A prefill, a step and the head of models of two sizes, in both precisions."""
    for family, precision, sizes in SHAPES:
        found = read(random_model(family, **sizes, num_hidden_layers=1))
        s, device = found.settings, torch.device("meta")
        passes = cuda.CudaPasses(pack(found, precision, cache=False), s, device)
        kind = {"dtype": torch.float16 if precision == "int8" else torch.float32, "device": device}
        keys = torch.empty(s.layers, 2, s.kv_heads, 64, s.head_width, 16, **kind)
        values = torch.empty(s.layers, 2, s.kv_heads, 1024, s.head_width, **kind)
        for lengths in ([30, 70], [1, 1]):
            bounds = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
            positions = torch.cat([torch.arange(length) for length in lengths])
            none = torch.zeros(2, dtype=torch.int32)
            slots = torch.arange(2, dtype=torch.int32)
            hidden = passes.forward(keys, values, positions % 50, None, positions, bounds, slots, none, none, s.layers)
        passes.logits(hidden, None)
