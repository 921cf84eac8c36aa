"""Whole runs of the codec, text to Z-tokens and back, against Hugging Face and PEFT."""
