"""Sizes taken from models, and lengths of mixed batches."""

from __future__ import annotations

import torch
from torch import Tensor

# hidden size, feed-forward size
SMOLLM2 = (576, 1536)
QWEN3 = (1024, 3072)
LLAMA_7B = (4096, 11008)
LLAMA_8B = (4096, 14336)
VOCABULARY = 49_152  # of SmolLM2


def mixed_lengths(sequences: int, longest: int, generator: torch.Generator) -> list[int]:
    """Lengths from 1 to `longest`, skewed to the short side as documents are: on average about 0.4 of the longest.

    The first is the longest, so that a padded batch has exactly that width.
    """
    draws = torch.rand(sequences, generator=generator, device=generator.device).tolist()
    lengths = [max(1, round(longest * draw**1.5)) for draw in draws]
    return [longest, *lengths[1:]]


def offsets(lengths: list[int], device: torch.device, dtype=torch.int32) -> Tensor:
    """cu_seqlens [B + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def padding_mask(lengths: list[int], longest: int, device: torch.device) -> Tensor:
    """bool [B, S], True where there is a row: what a padded Hugging Face batch carries as its attention mask."""
    return torch.arange(longest, device=device)[None] < torch.tensor(lengths, device=device)[:, None]
