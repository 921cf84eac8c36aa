"""What exact mode adds to the codes of a document so that every byte comes back."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from ztok_fast.codec.bitpack import packed_size
from ztok_fast.codec.errors import ZBatchError
from ztok_fast.codec.exact_patch import Patch, apply_patch, make_patch

PATCH_HEADER_BYTES = 8
"""Counted for a patch besides its compressed bytes: its start and end."""


@dataclass(eq=False)
class Corrections:
    """The corrections of one document.

    Attributes:
        positions: int32 ``[C]``, strictly increasing token indices in the document.
        tokens: int32 ``[C]``, the true token at each position.
        patch: from the corrected tokens' bytes to the original's, where the tokenizer does not
            round-trip; ``None`` where it does.
        raw: the original's bytes; then there is nothing else, and nothing to decode.
        remainder: the tokens that the Z-tokens do not write, coded under the decompressor (`remainder`); empty where
            its guesses are right. ``None`` where corrections are stored instead, for bits that are not the same on
            every machine (precision "float").
    """

    positions: torch.Tensor
    tokens: torch.Tensor
    patch: Patch | None = None
    raw: bytes | None = None
    remainder: bytes | None = None

    @classmethod
    def none_needed(cls) -> Corrections:
        """Corrections of a document that decodes exactly as it is."""
        return cls(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))

    @classmethod
    def of_remainder(cls, remainder: bytes) -> Corrections:
        """None, since the remainder gives every token."""
        own = cls.none_needed()
        own.remainder = remainder
        return own

    @classmethod
    def stored_raw(cls, original: bytes) -> Corrections:
        """Corrections that are the original itself."""
        empty = cls.none_needed()
        empty.raw = original
        return empty

    def smallest(self, decoded: bytes, original: bytes) -> Corrections:
        """These with a patch where one is needed, or the raw original where that is smaller.

        ``decoded`` holds the bytes that the document's true tokens decode to.
        """
        patch = None if decoded == original else make_patch(decoded, original)
        patched, raw = replace(self, patch=patch), Corrections.stored_raw(original)
        return raw if raw.stored_bytes < patched.stored_bytes else patched

    def apply(self, tokens: torch.Tensor) -> torch.Tensor:
        """A copy of the document's decoded tokens ``[N]`` with the true token at every position."""
        corrected = tokens.clone()
        corrected[self.positions.to(tokens.device).long()] = self.tokens.to(tokens)
        return corrected

    def restore(self, decoded: bytes) -> bytes:
        """The original's bytes, given those that the corrected tokens decode to (unused where ``raw`` is stored)."""
        if self.raw is not None:
            return self.raw
        return decoded if self.patch is None else apply_patch(decoded, self.patch)

    @property
    def stored_bytes(self) -> int:
        """Bytes in a file: packed positions and tokens or the remainder, compressed patch and raw bytes."""
        count = len(self.positions)
        size = packed_size(count, bit_width(self.gaps)) + packed_size(count, bit_width(self.tokens))
        if self.patch is not None:
            size += PATCH_HEADER_BYTES + len(zlib.compress(self.patch.replacement, 9))
        return size + len(self.remainder or b"") + (0 if self.raw is None else len(zlib.compress(self.raw, 9)))

    @property
    def gaps(self) -> torch.Tensor:
        """Positions as int32 ``[C]`` distances, each from the place after the one before: small numbers pack well."""
        before = torch.nn.functional.pad(self.positions[:-1] + 1, (1, 0)) if len(self.positions) else self.positions
        return self.positions - before

    def validate(self, tokens: int) -> None:
        """Raise `ZBatchError` unless these fit a document of ``tokens`` text tokens."""
        for name, value in (("positions", self.positions), ("tokens", self.tokens)):
            if not isinstance(value, torch.Tensor) or value.dtype != torch.int32 or value.dim() != 1:
                raise ZBatchError(f"corrections.{name}: expected an int32 vector, got {_describe(value)}")
        if len(self.positions) != len(self.tokens):
            raise ZBatchError(
                f"corrections: expected as many tokens as positions, got {len(self.tokens)} and {len(self.positions)}"
            )
        if len(self.positions):
            if bool((self.gaps < 0).any()):
                raise ZBatchError("corrections.positions: expected strictly increasing token indices from 0 on")
            if int(self.positions[-1]) >= tokens:
                raise ZBatchError(
                    f"corrections.positions: expected indices below the document's {tokens} tokens, "
                    f"got {int(self.positions[-1])}"
                )
            if int(self.tokens.min()) < 0:
                raise ZBatchError(f"corrections.tokens: expected token ids, got {int(self.tokens.min())}")
        if self.raw is not None and (len(self.positions) or self.patch is not None or self.remainder is not None):
            raise ZBatchError(
                "corrections: expected raw bytes alone, got positions, a patch or a remainder beside them"
            )
        if self.remainder is not None and not isinstance(self.remainder, bytes):
            raise ZBatchError(f"corrections.remainder: expected bytes, got {type(self.remainder).__name__}")
        if self.remainder is not None and len(self.positions):
            raise ZBatchError("corrections: expected a remainder or positions, got both")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Corrections):
            return NotImplemented
        return (
            torch.equal(self.positions, other.positions)
            and torch.equal(self.tokens, other.tokens)
            and (self.patch, self.raw, self.remainder) == (other.patch, other.raw, other.remainder)
        )


def bit_width(values: torch.Tensor | np.ndarray) -> int:
    """Bits, at least 1, that the largest of some non-negative integers needs."""
    return max(1, int(values.max()).bit_length()) if len(values) else 1


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
