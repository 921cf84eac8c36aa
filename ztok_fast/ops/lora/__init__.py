"""LoRA linear layer: one adapter, or several in one batch."""

from ztok_fast.ops.lora.lora_linear import lora_linear

__all__ = ["lora_linear"]
