"""Writing a file or folder so that others see all of it or nothing."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_atomically(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on leaving without an error it takes the target's place.

    The caller creates a file or a folder at the yielded path. An existing *file* is replaced; a
    folder cannot replace one that is not empty, and ``OSError`` says so. After an error nothing is
    left behind and an older target is untouched. Missing parent folders are made.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are private to their owner, and a rename would keep that.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
