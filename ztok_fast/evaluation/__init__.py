"""How well a codec restores text for what it stores, beside what remains without its language model."""
