"""LoRA linear layer: one adapter, or several in one batch."""

from ztok_fast.ops.lora.contract import lora_linear

__all__ = ["lora_linear"]
