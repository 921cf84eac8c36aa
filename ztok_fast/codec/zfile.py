"""The ``.ztok`` file: compressed documents in the safetensors format.

String metadata holds the format and its version, the codec's fingerprint, ``num_codebooks`` (L), ``codebook_size``
(V), ``max_unit_length``, ``precision``, ``content_sha256`` and ``documents``, a JSON list with one object for each
document. The tensors, all ``uint8`` (packed by `ztok_fast.codec.bitpack`, documents one after another):

=====================  ===========================================================================================
``codes``              of each document the ``[K, levels]`` codes that it uses, ceil(log2 V) bits each; its own bytes
``unit_lengths``       unit lengths less 1 of all Z-tokens, ceil(log2 max_unit_length) bits each
``segment_rows``       Z-tokens of every segment, ``segment_bits`` (metadata) each
``correction_gaps``    exact mode: distances between corrected positions, ``gap_bits`` (of the document) each
``correction_tokens``  exact mode: true tokens there, ``token_bits`` (of the document) each
``patches``, ``raw``   exact mode: zlib streams of patches and of whole originals
=====================  ===========================================================================================

Where the codes are slots (format version 2), ``codes`` is the one stream of `ztok_fast.codec.slot_coding`, for all
documents, and ``unit_lengths`` is empty.

There is no parser here beyond safetensors, JSON and zlib, and nothing in a file is ever run. Loading checks the
content's SHA-256, then every count, size and range, and last `ZBatch.validate`. The module is told which class to
make of a file (`ZBatch`), so that it need not import what imports it.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from ztok_fast.codec.bitpack import MAX_BITS, pack_codes, packed_size, unpack_codes
from ztok_fast.codec.corrections import Corrections, bit_width
from ztok_fast.codec.documents import MAX_CODEBOOKS, DocumentInfo
from ztok_fast.codec.errors import ZBatchError, ZFileError
from ztok_fast.codec.exact_patch import Patch
from ztok_fast.codec.slot_coding import decode_slots, encode_slots
from ztok_fast.files import replace_atomically

if TYPE_CHECKING:
    from ztok_fast.codec.zbatch import ZBatch

FORMAT = "ztok"
FORMAT_VERSION, SLOTS_VERSION = 1, 2
MOST_ZTOKENS_OF_A_BYTE = 1 << 12
"""A stream that has learned that Z-tokens are all alike holds many in a byte; a damaged one asks for more."""
CODED_MAGIC = b"ZC"
"""How files of coded units begin (`ztok_fast.codec.coded_file`)."""
TENSORS = ("codes", "unit_lengths", "segment_rows", "correction_gaps", "correction_tokens", "patches", "raw")
_SETTINGS = ("num_codebooks", "codebook_size", "max_unit_length", "segments", "segment_bits")
_LARGEST_COUNT = (1 << 31) - 1


def save_zfile(batch: ZBatch, path: str | Path) -> None:
    """Validate and write a batch; an older file is replaced only once the new one is whole.

    Raises:
        ZBatchError: the batch is not valid.
        ZFileError: the path does not end in ``.ztok``.
    """
    path = Path(path)
    if path.suffix != ".ztok":
        raise ZFileError(f"path: expected a file name that ends in .ztok, got {path}")
    tensors, metadata = to_tensors(batch)
    with replace_atomically(path) as temporary:
        temporary.write_bytes(serialize(tensors, metadata))


def to_tensors(batch: ZBatch) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A valid batch as the tensors and the metadata of a file."""
    batch.validate()
    parts: dict[str, list[bytes]] = {name: [] for name in TENSORS}
    rows = batch.cu_segments.diff()
    segment_bits = bit_width(rows)
    parts["segment_rows"].append(pack_codes(rows.numpy(), segment_bits).tobytes())
    slots = batch.slot_offsets is not None
    if slots:
        parts["codes"].append(encode_slots(batch, batch.codebook_size, batch.max_unit_length))
    else:
        lengths = batch.unit_lengths.numpy() - 1
        parts["unit_lengths"].append(pack_codes(lengths, _bits_for(batch.max_unit_length)).tobytes())
    code_bits = _bits_for(batch.codebook_size)
    documents = []
    for one in batch:
        info = one.documents[0]
        if not slots:
            parts["codes"].append(pack_codes(one.codes[:, : info.levels].numpy(), code_bits).tobytes())
        documents.append(
            {
                "tokens": info.tokens,
                "segments": len(one.cu_segments) - 1,
                "ztokens": one.ztokens,
                "levels": info.levels,
                "budget": float(info.budget),
                "achieved_ratio": _number(one.achieved_ratio),
                "rate": _number(one.rate),
                "sha256": info.sha256,
                "byte_length": info.byte_length,
                "corrections": _corrections_to(info.corrections, parts),
            }
        )
    tensors = {name: np.frombuffer(b"".join(chunks), np.uint8) for name, chunks in parts.items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(SLOTS_VERSION if slots else FORMAT_VERSION),
        "codec_fingerprint": batch.codec_fingerprint,
        "num_codebooks": str(batch.num_codebooks),
        "codebook_size": str(batch.codebook_size),
        "max_unit_length": str(batch.max_unit_length),
        "precision": batch.precision,
        "segments": str(len(rows)),
        "segment_bits": str(segment_bits),
        "documents": json.dumps(documents),
    }
    metadata["content_sha256"] = content_sha256(tensors, metadata)
    return tensors, metadata


def content_sha256(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 over a file's metadata (but this entry) and tensors: finds damage, proves no origin."""
    stated = {key: value for key, value in metadata.items() if key != "content_sha256"}
    digest = hashlib.sha256(json.dumps(stated, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def begins_as_coded(head: bytes) -> bool:
    """Whether a file begins as one of coded units, and not as a safetensors file whose header has such a length."""
    return head.startswith(CODED_MAGIC) and head[4:9] != b"\0\0\0\0{"


def load_zfile(path: str | Path, make: type[ZBatch]) -> ZBatch:
    """Read and check a ``.ztok`` file.

    Args:
        make: the class of the result, `ZBatch`.

    Raises:
        ZFileError: the file is missing, truncated, foreign, of another format version, altered or
            inconsistent; the message names the file and says which.
    """
    path = Path(path)
    if not path.is_file():
        raise ZFileError(f"{path}: expected an existing .ztok file, got none")
    with path.open("rb") as stream:
        if begins_as_coded(stream.read(16)):
            raise ZFileError(
                f"{path}: expected Z-tokens, got coded units, which are text for storage: decompress the file, and "
                "compress the text without --units coded"
            )
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_format(metadata)
            if set(file.keys()) != set(TENSORS):
                raise ZFileError(f"expected the tensors {sorted(TENSORS)}, got {sorted(file.keys())[:10]}")
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        for name, value in tensors.items():
            if value.dtype != np.uint8 or value.ndim != 1:
                raise ZFileError(f"{name}: expected a uint8 vector, got {value.dtype} {list(value.shape)}")
        if metadata.get("content_sha256") != content_sha256(tensors, metadata):
            raise ZFileError("its contents do not have the SHA-256 that it states: the file is damaged")
        return from_tensors(tensors, metadata, make)
    except SafetensorError as error:
        raise ZFileError(f"{path}: not a whole .ztok file (truncated, or of another kind): {error}") from error
    except (ZFileError, ZBatchError) as error:
        raise ZFileError(f"{path}: {error}") from error


def _check_format(metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ZFileError("expected a .ztok file, got a safetensors file of another kind")
    version = metadata.get("format_version")
    if version not in (str(FORMAT_VERSION), str(SLOTS_VERSION)):
        raise ZFileError(
            f"expected .ztok format version {FORMAT_VERSION} or {SLOTS_VERSION}, got {version!r}: "
            "another release wrote it"
        )


def from_tensors(tensors: dict[str, np.ndarray], metadata: dict[str, str], make: type[ZBatch]) -> ZBatch:
    """The inverse of `to_tensors` with every check but that of the content's SHA-256."""
    settings = {}
    for name in _SETTINGS:
        value = metadata.get(name, "")
        # isascii: str.isdigit alone also takes digits that int() reads from other scripts.
        if not (value.isascii() and value.isdigit() and len(value) <= 10 and int(value) <= _LARGEST_COUNT):
            raise ZFileError(f"metadata {name}: expected a decimal number, got {value[:40]!r}")
        settings[name] = int(value)
    if not 1 <= settings["num_codebooks"] <= MAX_CODEBOOKS:
        raise ZFileError(f"metadata num_codebooks: expected 1 to {MAX_CODEBOOKS}, got {settings['num_codebooks']}")
    if settings["codebook_size"] < 2 or settings["max_unit_length"] < 1:
        raise ZFileError(f"metadata: expected a codebook_size of 2 or more and a max_unit_length of 1, got {settings}")
    described = _read_documents(metadata.get("documents", ""))
    readers = {name: _Reader(name, value) for name, value in tensors.items()}
    width = settings["num_codebooks"]
    code_bits = _bits_for(settings["codebook_size"])
    rows = readers["segment_rows"].codes(settings["segments"], _checked_bits("segment_bits", settings["segment_bits"]))
    codes, documents, cu_documents = [], [], [0]
    slots = metadata.get("format_version") == str(SLOTS_VERSION)
    for index, entry in enumerate(described):
        try:
            first, last = cu_documents[-1], cu_documents[-1] + _count(entry, "segments")
            held = int(rows[first:last].sum())
            if last > len(rows) or held != _count(entry, "ztokens"):
                raise ZFileError(f"expected its {entry['ztokens']} Z-tokens in its segments, got {held}")
            levels = _count(entry, "levels")
            if not 1 <= levels <= width:
                raise ZFileError(f"levels: expected 1 to {width}, got {levels}")
            if not slots:
                used = readers["codes"].codes(held * levels, code_bits).reshape(held, levels)
                codes.append(np.pad(used, ((0, 0), (0, width - levels)), constant_values=-1))
            documents.append(_document_from(entry, levels, readers))
            cu_documents.append(last)
        except (ZFileError, ZBatchError) as error:
            raise ZFileError(f"document {index}: {error}") from error
    if cu_documents[-1] != len(rows):
        raise ZFileError(f"segments: expected {cu_documents[-1]} as the documents state, got {len(rows)}")
    ztokens = int(rows.sum())
    places = None
    if slots:
        # A Z-token takes some bits of the stream, but no more than a few bytes may ask for much memory.
        stream = readers["codes"].rest()
        if ztokens > MOST_ZTOKENS_OF_A_BYTE * len(stream):
            raise ZFileError(f"codes: expected a stream of {ztokens} Z-tokens, got {len(stream)} bytes")
        stored, lengths, places = decode_slots(
            stream, ztokens, width, settings["codebook_size"], settings["max_unit_length"]
        )
    else:
        lengths = torch.from_numpy(
            (readers["unit_lengths"].codes(ztokens, _bits_for(settings["max_unit_length"])) + 1).astype(np.int32)
        )
        stored = torch.from_numpy(np.concatenate(codes or [np.zeros((0, width))]).astype(np.int32))
    for reader in readers.values():
        reader.finish()
    batch = make(
        codes=stored,
        unit_lengths=lengths,
        slot_offsets=places,
        cu_segments=torch.from_numpy(np.concatenate([[0], rows.cumsum()]).astype(np.int32)),
        cu_documents=torch.tensor(cu_documents, dtype=torch.int32),
        documents=documents,
        codec_fingerprint=metadata.get("codec_fingerprint", ""),
        codebook_size=settings["codebook_size"],
        max_unit_length=settings["max_unit_length"],
        precision=metadata.get("precision", "float"),  # older files have none
    ).validate()
    for index, (one, entry) in enumerate(zip(batch, described)):
        for name in ("achieved_ratio", "rate"):
            if not _same_number(entry.get(name), getattr(one, name)):
                raise ZFileError(
                    f"document {index}: {name}: expected {getattr(one, name)}, got {str(entry.get(name))[:40]}"
                )
    return batch


class _Reader:
    """Takes the parts of one tensor in order and refuses to read past its end or to leave anything."""

    def __init__(self, name: str, data: np.ndarray) -> None:
        self.name, self.data, self.used = name, data, 0

    def take(self, count: int) -> bytes:
        left = len(self.data) - self.used
        if count > left:
            raise ZFileError(f"{self.name}: expected {count} more bytes, got {left}")
        self.used += count
        return self.data[self.used - count : self.used].tobytes()

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.used)

    def codes(self, count: int, bits: int) -> np.ndarray:
        try:
            return unpack_codes(self.take(packed_size(count, bits)), bits, count)
        except ZFileError:
            raise
        except ValueError as error:
            raise ZFileError(f"{self.name}: {error}") from error

    def zlib(self, stored: int, length: int) -> bytes:
        # Never more than was stated: a few bytes can inflate to gigabytes.
        inflater = zlib.decompressobj()
        try:
            data = inflater.decompress(self.take(stored), length + 1)
        except zlib.error as error:
            raise ZFileError(f"{self.name}: expected a zlib stream, got {error}") from error
        if len(data) != length or not inflater.eof or inflater.unused_data:
            raise ZFileError(f"{self.name}: expected a zlib stream of {length} bytes, got another length")
        return data

    def finish(self) -> None:
        if self.used != len(self.data):
            raise ZFileError(f"{self.name}: expected {self.used} bytes, got {len(self.data)}")


def _read_documents(text: str) -> list[dict]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError also for an integer of thousands of digits
        raise ZFileError(f"metadata documents: expected a JSON list, got {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ZFileError("metadata documents: expected a JSON list of objects")
    return entries


def _document_from(entry: dict, levels: int, readers: dict[str, _Reader]) -> DocumentInfo:
    budget = entry.get("budget")
    if not _is_number(budget):
        raise ZFileError(f"budget: expected a number, got {str(budget)[:40]}")
    byte_length = None if entry.get("byte_length") is None else _count(entry, "byte_length")
    stated = entry.get("corrections")
    corrections = None
    if stated is not None:
        if not isinstance(stated, dict):
            raise ZFileError(f"corrections: expected an object, got {type(stated).__name__}")
        corrections = _corrections_from(stated, byte_length, readers)
    return DocumentInfo(_count(entry, "tokens"), float(budget), levels, entry.get("sha256"), byte_length, corrections)


def _corrections_to(corrections: Corrections | None, parts: dict[str, list[bytes]]) -> dict | None:
    if corrections is None:
        return None
    gaps, tokens = corrections.gaps.numpy(), corrections.tokens.numpy()
    stated: dict[str, Any] = {"count": len(gaps), "gap_bits": bit_width(gaps), "token_bits": bit_width(tokens)}
    parts["correction_gaps"].append(pack_codes(gaps, stated["gap_bits"]).tobytes())
    parts["correction_tokens"].append(pack_codes(tokens, stated["token_bits"]).tobytes())
    if corrections.patch is not None:
        patch = corrections.patch
        parts["patches"].append(zlib.compress(patch.replacement, 9))
        stated["patch"] = {
            "start": patch.start,
            "end": patch.end,
            "length": len(patch.replacement),
            "stored": len(parts["patches"][-1]),
        }
    if corrections.raw is not None:
        parts["raw"].append(zlib.compress(corrections.raw, 9))
        stated["raw_stored"] = len(parts["raw"][-1])
    return stated


def _corrections_from(stated: dict, byte_length: int | None, readers: dict[str, _Reader]) -> Corrections:
    count = _count(stated, "count")
    gap_bits, token_bits = (_checked_bits(name, _count(stated, name)) for name in ("gap_bits", "token_bits"))
    positions = (readers["correction_gaps"].codes(count, gap_bits) + 1).cumsum() - 1
    tokens = readers["correction_tokens"].codes(count, token_bits)
    for name, values in (("positions", positions), ("tokens", tokens)):
        if len(values) and int(values.max()) > _LARGEST_COUNT:
            raise ZFileError(f"corrections.{name}: expected 32-bit integers, got {int(values.max())}")
    patch = raw = None
    if "patch" in stated:
        entry = stated["patch"]
        if not isinstance(entry, dict):
            raise ZFileError(f"patch: expected an object, got {type(entry).__name__}")
        replacement = readers["patches"].zlib(_count(entry, "stored"), _count(entry, "length"))
        patch = Patch(_count(entry, "start"), _count(entry, "end"), replacement)
    if "raw_stored" in stated:
        if byte_length is None:
            raise ZFileError("byte_length: expected a number beside raw bytes, got none")
        raw = readers["raw"].zlib(_count(stated, "raw_stored"), byte_length)
    as_int32 = [torch.from_numpy(values.astype(np.int32)) for values in (positions, tokens)]
    return Corrections(as_int32[0], as_int32[1], patch, raw)


def _bits_for(size: int) -> int:
    """Bits of one of ``size`` different values, at least 1."""
    return max(1, (size - 1).bit_length())


def _checked_bits(name: str, bits: int) -> int:
    if not 1 <= bits <= MAX_BITS:
        raise ZFileError(f"{name}: expected 1 to {MAX_BITS}, got {bits}")
    return bits


def _count(entry: dict, name: str) -> int:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST_COUNT:
        raise ZFileError(f"{name}: expected a count, got {str(value)[:40]}")
    return value


def _number(value: float) -> float | None:
    """JSON has no NaN: the ratio and rate of an empty document are null."""
    return None if math.isnan(value) else value


def _same_number(stated: object, computed: float) -> bool:
    if math.isnan(computed):
        return stated is None
    return _is_number(stated) and math.isclose(stated, computed, rel_tol=1e-9)


def _is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a number that a float holds; JSON's integers have no largest one."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
