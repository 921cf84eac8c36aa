"""LoRA linear layer: one adapter, or several in one batch."""
