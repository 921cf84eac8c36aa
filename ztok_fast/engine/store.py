"""Packed weights kept in the cache folder: written once, mapped by every process that uses them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ztok_fast.files import cache_folder, replace_atomically

ALIGNMENT = 64
KEPT_FILES, KEPT_BYTES = 16, 8 << 30
"""What the folder holds at most: those used last stay. The file that was just written stays whatever its size."""

_log = logging.getLogger(__name__)


def path_of(key: str) -> Path:
    """Where the weights with this key are kept, beside the converted base models."""
    return cache_folder() / "engine" / f"{key[:32]}.safetensors"


def aligned_bytes(size: int) -> Tensor:
    """uint8 [size], uninitialised, that starts at a multiple of 64 bytes."""
    block = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    start = -block.data_ptr() % ALIGNMENT
    return block[start : start + size]


def load(key: str, size: int) -> Tensor | None:
    """The weights with this key, mapped into memory; None where there are none, or where the file is damaged."""
    path = path_of(key)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            described = file.metadata() or {}
            blob = file.get_tensor("weights")
    except (SafetensorError, OSError) as error:
        _log.warning("engine: %s is damaged and will be written again: %s", path, error)
        return None
    if described.get("key") != key or blob.dtype != torch.uint8 or tuple(blob.shape) != (size,):
        _log.warning("engine: %s holds other weights and will be written again", path)
        return None
    if described.get("sha256") != _digest(blob):
        _log.warning("engine: %s is damaged and will be written again: its bytes have another SHA-256", path)
        return None
    with suppress(OSError):
        os.utime(path)  # it was used
    return blob if blob.data_ptr() % ALIGNMENT == 0 else aligned_bytes(size).copy_(blob)


def save(key: str, blob: Tensor) -> None:
    """Keep weights under a key. Where they cannot be written, that is logged; the next process packs them again."""
    path = path_of(key)
    try:
        with replace_atomically(path) as temporary, open(temporary, "wb") as stream:
            stream.write(_header(key, blob))
            stream.write(blob.numpy().data)
    except OSError as error:
        _log.warning("engine: the packed weights cannot be kept: %s", error)
        return
    _prune(path, blob.numel())


def _prune(written: Path, size: int) -> None:
    """Remove the files that were used longest ago, until all are within the limits; `written`, of `size` bytes, stays.

    Processes that have mapped a removed file keep its bytes.
    """
    others = []
    for path in written.parent.glob("*.safetensors"):
        with suppress(OSError):  # another process may have removed it
            if path != written:
                status = path.stat()
                others.append((status.st_mtime_ns, path, status.st_size))
    for count, (_, path, bytes_here) in enumerate(sorted(others, reverse=True), 2):
        size += bytes_here
        if count > KEPT_FILES or size > KEPT_BYTES:
            with suppress(OSError):
                path.unlink()


def _header(key: str, blob: Tensor) -> bytes:
    """The header of a safetensors file. `save_file` of the library would not align the bytes that follow."""
    entries = {
        "__metadata__": {"format": "pt", "key": key, "sha256": _digest(blob)},
        "weights": {"dtype": "U8", "shape": list(blob.shape), "data_offsets": [0, blob.numel()]},
    }
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _digest(blob: Tensor) -> str:
    return hashlib.sha256(blob.numpy().data).hexdigest()
