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


@dataclass
class DocumentInfo:
    """One document of a `ZBatch`.

    Attributes:
        tokens: text tokens that the document had, N.
        budget: the ratio asked for, text tokens per Z-token.
        levels: residual levels used, 1 to L; the codes of the others are -1.
        sha256, byte_length: of the original as UTF-8; ``None`` where there is none, as for generated Z-tokens.
        corrections: of exact mode, else ``None``.
    """

    tokens: int
    budget: float
    levels: int
    sha256: str | None = None
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
        if (self.sha256 is None) != (self.byte_length is None):
            raise ZBatchError("sha256 and byte_length: expected both or neither, got one")
        if self.sha256 is not None:
            if not isinstance(self.sha256, str) or not SHA256.fullmatch(self.sha256):
                raise ZBatchError(f"sha256: expected 64 lower-case hexadecimal digits, got {self.sha256!r}")
            if not is_integer(self.byte_length, 0):
                raise ZBatchError(f"byte_length: expected an integer of at least 0, got {self.byte_length!r}")
        if self.corrections is not None:
            if self.sha256 is None:
                raise ZBatchError("corrections: expected a SHA-256 of the original beside them, got none")
            self.corrections.validate(self.tokens)
            raw = self.corrections.raw
            if raw is not None and len(raw) != self.byte_length:
                raise ZBatchError(f"corrections.raw: expected {self.byte_length} bytes, got {len(raw)}")

    def verify(self, data: bytes) -> None:
        """Raise `ExactMismatchError` unless ``data`` is byte for byte what was compressed."""
        if self.sha256 is None:
            raise ExactMismatchError("document: expected a SHA-256 of its original to compare with, got none")
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.sha256 or len(data) != self.byte_length:
            raise ExactMismatchError(
                f"the text that came back ({len(data)} bytes, SHA-256 {digest[:16]}...) is not the original "
                f"({self.byte_length} bytes, SHA-256 {self.sha256[:16]}...). It is damaged, or, with precision float, "
                "made on another machine, whose rounding may differ"
            )


def is_integer(value: object, low: int, high: float = math.inf) -> bool:
    """Whether ``value`` is an integer, and no boolean, from ``low`` to ``high``."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
