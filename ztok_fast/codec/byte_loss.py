"""Which bytes of a document its tokens cannot represent; only exact mode keeps those."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from ztok_fast.codec.errors import LossyTextWarning
from ztok_fast.codec.exact_patch import make_patch


def warn_of_lost_bytes(originals: list[bytes], decoded: Iterable[bytes]) -> None:
    """Issue one `LossyTextWarning` where the bytes of a document's true tokens are not the original's.

    Args:
        originals: the documents; decoded: the bytes that the tokens of each decode to, if every one comes back.
    """
    lost = [(index, own, new) for index, (own, new) in enumerate(zip(originals, decoded)) if own != new]
    if lost:
        _, original, text = lost[0]
        # The caller of compress is two frames above.
        warnings.warn(LossyTextWarning([index for index, _, _ in lost], make_patch(text, original).start), stacklevel=3)
