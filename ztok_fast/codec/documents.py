"""What is known of a compressed document beside its codes."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass

from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.errors import ExactMismatchError, ZBatchError

MAX_CODEBOOKS = 256
"""Far above any useful number of levels; bounds what a file can make its reader allocate."""

SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"[0-9a-f]{16}")
HASH_BYTES = 8


def digest_of(text: bytes) -> bytes:
    """The hash of a text that files have, 64 bits of BLAKE2b."""
    return hashlib.blake2b(text, digest_size=HASH_BYTES).digest()


@dataclass
class DocumentInfo:
    """One document of a `ZBatch`.

    Attributes:
        tokens: text tokens that the document had, N.
        budget: the ratio asked for, text tokens per Z-token.
        levels: residual levels used, 1 to L; the codes of the others are -1.
        byte_length: of the original as UTF-8; ``None`` where there is none, as for generated Z-tokens.
        digest: of exact mode, `digest_of` the original in hexadecimal, else ``None``.
        corrections: of exact mode, else ``None``.
    """

    tokens: int
    budget: float
    levels: int
    digest: str | None = None
    byte_length: int | None = None
    corrections: Corrections | None = None

    def validate(self, num_codebooks: int) -> None:
        """Raise `ZBatchError` unless this can be a document of a codec with ``num_codebooks`` codebooks."""
        if not is_integer(self.tokens, 0):
            raise ZBatchError(f"tokens: expected an integer of at least 0, got {self.tokens!r}")
        budget = self.budget
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 1 <= budget < math.inf:
            raise ZBatchError(f"budget: expected a ratio of at least 1, got {budget!r}")
        if not is_integer(self.levels, 1, num_codebooks):
            raise ZBatchError(f"levels: expected an integer from 1 to {num_codebooks}, got {self.levels!r}")
        if self.byte_length is not None and not is_integer(self.byte_length, 0):
            raise ZBatchError(f"byte_length: expected an integer of at least 0, got {self.byte_length!r}")
        if (self.digest is None) != (self.corrections is None):
            raise ZBatchError("digest: expected one with exact mode's corrections and none without, got other")
        if self.digest is not None and (not isinstance(self.digest, str) or not _DIGEST.fullmatch(self.digest)):
            raise ZBatchError(f"digest: expected 16 lower-case hexadecimal digits, got {self.digest!r}")
        if self.corrections is not None:
            if self.byte_length is None:
                raise ZBatchError("corrections: expected the byte_length of the original beside them, got none")
            self.corrections.validate(self.tokens)
            raw = self.corrections.raw
            if raw is not None and len(raw) != self.byte_length:
                raise ZBatchError(f"corrections.raw: expected {self.byte_length} bytes, got {len(raw)}")

    def verify(self, data: bytes) -> None:
        """Raise `ExactMismatchError` unless ``data`` is byte for byte what was compressed."""
        if self.digest is None:
            raise ExactMismatchError("document: expected a hash of its original to compare with, got none")
        digest = digest_of(data).hex()
        if digest != self.digest or len(data) != self.byte_length:
            raise ExactMismatchError(
                f"the text that came back ({len(data)} bytes, hash {digest}) is not the original ({self.byte_length} "
                f"bytes, hash {self.digest}). It is damaged, or, with precision float, made on another machine, whose "
                "rounding may differ"
            )


def is_integer(value: object, low: int, high: float = math.inf) -> bool:
    """Whether ``value`` is an integer, and no boolean, from ``low`` to ``high``."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
