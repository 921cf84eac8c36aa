"""The codec: text to Z-tokens and back on a frozen Hugging Face causal language model."""
