"""Files that the package keeps: the cache folder, and writing so that others see all of a file or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that only writing gives: the disk is full, or the user's quota or the largest file size is reached."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/ztok_fast`` or ``~/.cache/ztok_fast``; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ztok_fast"


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes as 64 lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def replace_atomically(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on leaving without an error it takes the target's place.

    The caller creates a file or a folder at the yielded path. An existing *file* is replaced; a
    folder cannot replace one that is not empty, and ``OSError`` says so. After an error nothing is
    left behind and an older target is untouched. Missing parent folders are made. Where ``target`` is a
    link, the file that it points to is replaced. A device or a pipe (``/dev/null``) is not: it is written to.

    Raises:
        OSError: the target cannot be written; its ``filename`` is ``target``, never the temporary path.
    """
    named, target = Path(target), Path(os.path.realpath(target))
    if target.exists() and not (target.is_file() or target.is_dir()):
        yield target
        return
    # Not tempfile: its files are private to their owner, and a rename would keep that. A name of its own, since
    # the target's with a suffix could be too long.
    temporary = target.with_name(f".ztok-{secrets.token_hex(8)}.tmp")
    try:
        _make_folder(target.parent)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if _concerns(error, temporary, target):
            raise OSError(error.errno, error.strerror, str(named)) from error
        raise
    finally:
        # What cannot be removed (another process removed the folder, say) must not hide the error that matters.
        with suppress(OSError):
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def _concerns(error: OSError, temporary: Path, target: Path) -> bool:
    """Whether an error is about the target: about the temporary path, a parent folder or the space for them."""
    if error.filename is None:
        return error.errno in _FULL
    if not isinstance(error.filename, (str, os.PathLike)):
        return False
    path = Path(error.filename)
    return path == temporary or temporary in path.parents or path in target.parents
