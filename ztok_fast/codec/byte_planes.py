"""Weights in less space: the bytes of 16-bit numbers apart, each half compressed.

Sign and exponent of trained bfloat16 weights take few values; the other byte is near random. Compressed apart they take
about 0.6 of a safetensors file. The result is a safetensors file too: ``header`` (that of the original), ``high`` and
``low`` (zlib streams of the odd and even bytes of its data), all uint8.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from ztok_fast.files import replace_atomically

_LENGTH_BYTES = 8
_LARGEST = 1 << 32
"""Bytes of the largest original that is read: a damaged file must not fill the memory."""


MANTISSA_BITS = 7
"""Of a bfloat16, without the leading one."""


def pack(original: bytes, mantissa_bits: int = MANTISSA_BITS) -> bytes:
    """A safetensors file whose data has an even number of bytes, packed.

    Args:
        mantissa_bits: 1 to 7; below 7 the numbers, which must be bfloat16, are rounded to so many: a bit less takes a
            sixteenth less of the original's size.
    """
    start = _LENGTH_BYTES + int.from_bytes(original[:_LENGTH_BYTES], "little")
    data = np.frombuffer(original, np.uint8, offset=start)
    if len(data) % 2:
        raise ValueError(f"weights: expected numbers of 16 bits, got {len(data)} bytes of data")
    if not 1 <= mantissa_bits <= MANTISSA_BITS:
        raise ValueError(f"mantissa_bits: expected 1 to {MANTISSA_BITS}, got {mantissa_bits}")
    if mantissa_bits < MANTISSA_BITS:
        types = {
            own["dtype"] for name, own in json.loads(original[_LENGTH_BYTES:start]).items() if name != "__metadata__"
        }
        if types - {"BF16"}:
            raise ValueError(f"mantissa_bits: expected weights in bfloat16, got {sorted(types)}")
        data = _rounded(data, MANTISSA_BITS - mantissa_bits)
    parts = {"header": original[:start], "high": _compressed(data[1::2]), "low": _compressed(data[0::2])}
    return save({name: np.frombuffer(part, np.uint8) for name, part in parts.items()})


def unpack(packed: bytes) -> bytes:
    """The inverse of `pack`.

    Raises:
        ValueError, zlib.error, safetensors.SafetensorError: the file is damaged.
    """
    parts = load(packed)
    if set(parts) != {"header", "high", "low"}:
        raise ValueError(f"expected the tensors header, high and low, got {sorted(parts)}")
    high, low = (_decompressed(parts[name].tobytes()) for name in ("high", "low"))
    if len(high) != len(low):
        raise ValueError(f"expected two halves of equal length, got {len(high)} and {len(low)} bytes")
    data = np.empty(2 * len(high), np.uint8)
    data[1::2], data[0::2] = np.frombuffer(high, np.uint8), np.frombuffer(low, np.uint8)
    return parts["header"].tobytes() + data.tobytes()


def pack_file(path: Path, target: Path, mantissa_bits: int = MANTISSA_BITS) -> None:
    """Write the packed form of a safetensors file; see `pack`."""
    with replace_atomically(target) as temporary:
        temporary.write_bytes(pack(path.read_bytes(), mantissa_bits))


def _rounded(data: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of 16 bits, as bytes, with the last ``bits`` of their mantissas rounded away, halves upwards."""
    whole = data.view("<u2").astype(np.uint32) + (1 << bits >> 1)
    return (whole >> bits << bits).astype("<u2").view(np.uint8)


def _compressed(part: np.ndarray) -> bytes:
    return zlib.compress(part.tobytes(), 9)


def _decompressed(stream: bytes) -> bytes:
    reader = zlib.decompressobj()
    data = reader.decompress(stream, _LARGEST)
    if not reader.eof:
        raise ValueError("expected a whole stream, got a part of one")
    return data
