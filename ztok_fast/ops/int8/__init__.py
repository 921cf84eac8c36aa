"""Linear layers of the inference engine: the same bits everywhere (docs/determinism.md)."""
