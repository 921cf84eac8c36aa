"""Bounded runs on a CUDA machine without a network, and the small files that such a machine takes and gives back."""
