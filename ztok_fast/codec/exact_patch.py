"""Byte patches: what turns decoded text into the original where the tokenizer cannot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ztok_fast.codec.errors import ZBatchError


@dataclass(frozen=True)
class Patch:
    """Replace bytes ``[start, end)`` of the decoded text by ``replacement``."""

    start: int
    end: int
    replacement: bytes

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ZBatchError(f"patch: expected 0 <= start <= end, got {self.start} and {self.end}")


def make_patch(decoded: bytes, original: bytes) -> Patch:
    """The patch between the longest common prefix and the longest common suffix after it.

    Linear in the length of the texts. Equal texts give an empty patch at their end.
    """
    shorter = min(len(decoded), len(original))
    old, new = np.frombuffer(decoded, np.uint8), np.frombuffer(original, np.uint8)
    prefix = _equal_run(old[:shorter], new[:shorter])
    rest = shorter - prefix
    suffix = _equal_run(old[len(old) - rest :][::-1], new[len(new) - rest :][::-1])
    return Patch(prefix, len(decoded) - suffix, original[prefix : len(original) - suffix])


def apply_patch(decoded: bytes, patch: Patch) -> bytes:
    """Apply a patch.

    Raises:
        ZBatchError: ``decoded`` is shorter than the patch's end, so it is not the text the patch was made for.
    """
    if patch.end > len(decoded):
        raise ZBatchError(f"patch: expected at least {patch.end} bytes to apply it to, got {len(decoded)}")
    return decoded[: patch.start] + patch.replacement + decoded[patch.end :]


def _equal_run(left: np.ndarray, right: np.ndarray) -> int:
    """How many leading bytes of two arrays of equal length agree."""
    different = left != right
    return int(different.argmax()) if different.any() else len(left)
