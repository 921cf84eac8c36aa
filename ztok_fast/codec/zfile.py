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

Where the codes are slots (format version 2), ``unit_lengths`` is empty, and ``codes`` is the one stream of
`ztok_fast.codec.slot_coding`, for all documents (metadata ``slots``: ``adaptive``), or the streams of
`ztok_fast.codec.slot_prior` (``prior``), which the codec writes and reads (`ztok_fast.codec.prior_files`).

There is no parser here beyond safetensors, JSON and zlib, and nothing in a file is ever run. Loading checks the
content's SHA-256, then every count, size and range, and last `ZBatch.validate`. The module is told which class to
make of a file (`ZBatch`), so that it need not import what imports it.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from ztok_fast.codec.bitpack import pack_codes
from ztok_fast.codec.corrections import Corrections, bit_width
from ztok_fast.codec.documents import MAX_CODEBOOKS, DocumentInfo
from ztok_fast.codec.errors import PriorNeededError, ZBatchError, ZFileError
from ztok_fast.codec.exact_patch import Patch
from ztok_fast.codec.file_parts import (
    LARGEST_COUNT,
    Reader,
    bits_for,
    checked_bits,
    is_number,
    json_number,
    read_count,
    same_number,
)
from ztok_fast.codec.slot_coding import encode_slots
from ztok_fast.codec.slot_files import ADAPTIVE, PRIOR, SlotReader, StoredSlots, read_slots
from ztok_fast.files import replace_atomically

if TYPE_CHECKING:
    from ztok_fast.codec.zbatch import ZBatch

FORMAT = "ztok"
FORMAT_VERSION, SLOTS_VERSION = 1, 2
CODED_MAGIC = b"ZC"
"""How files of coded units begin (`ztok_fast.codec.coded_file`)."""
TENSORS = ("codes", "unit_lengths", "segment_rows", "correction_gaps", "correction_tokens", "patches", "raw")
_SETTINGS = ("num_codebooks", "codebook_size", "max_unit_length", "segments", "segment_bits")


def save_zfile(batch: ZBatch, path: str | Path, prior: bytes | None = None) -> None:
    """Validate and write a batch; an older file is replaced only once the new one is whole.

    Args:
        prior: the batch's slots as `ztok_fast.codec.prior_files` codes them, stored where that is smaller.

    Raises:
        ZBatchError: the batch is not valid.
        ZFileError: the path does not end in ``.ztok``.
    """
    path = Path(path)
    if path.suffix != ".ztok":
        raise ZFileError(f"path: expected a file name that ends in .ztok, got {path}")
    tensors, metadata = to_tensors(batch, prior)
    with replace_atomically(path) as temporary:
        temporary.write_bytes(serialize(tensors, metadata))


def to_tensors(batch: ZBatch, prior: bytes | None = None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A valid batch as the tensors and the metadata of a file; ``prior`` as in `save_zfile`."""
    batch.validate()
    parts: dict[str, list[bytes]] = {name: [] for name in TENSORS}
    rows = batch.cu_segments.diff()
    segment_bits = bit_width(rows)
    parts["segment_rows"].append(pack_codes(rows.numpy(), segment_bits).tobytes())
    slots = batch.slot_offsets is not None
    if slots:
        adaptive = encode_slots(batch, batch.codebook_size, batch.max_unit_length)
        coding = ADAPTIVE if prior is None or len(prior) >= len(adaptive) else PRIOR
        parts["codes"].append(adaptive if prior is None or coding == ADAPTIVE else prior)
    else:
        lengths = batch.unit_lengths.numpy() - 1
        parts["unit_lengths"].append(pack_codes(lengths, bits_for(batch.max_unit_length)).tobytes())
    code_bits = bits_for(batch.codebook_size)
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
                "achieved_ratio": json_number(one.achieved_ratio),
                "rate": json_number(one.rate),
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
    if slots:
        metadata["slots"] = coding
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


def load_zfile(path: str | Path, make: type[ZBatch], read_prior: SlotReader | None = None) -> ZBatch:
    """Read and check a ``.ztok`` file.

    Args:
        make: the class of the result, `ZBatch`.
        read_prior: reads slots that are coded under a codec's compressor.

    Raises:
        PriorNeededError: the file has such slots, and ``read_prior`` is not given.
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
        return from_tensors(tensors, metadata, make, read_prior)
    except SafetensorError as error:
        raise ZFileError(f"{path}: not a whole .ztok file (truncated, or of another kind): {error}") from error
    except PriorNeededError as error:
        raise PriorNeededError(f"{path}: {error}") from error
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


def from_tensors(
    tensors: dict[str, np.ndarray],
    metadata: dict[str, str],
    make: type[ZBatch],
    read_prior: SlotReader | None = None,
) -> ZBatch:
    """The inverse of `to_tensors` with every check but that of the content's SHA-256."""
    settings = {}
    for name in _SETTINGS:
        value = metadata.get(name, "")
        # isascii: str.isdigit alone also takes digits that int() reads from other scripts.
        if not (value.isascii() and value.isdigit() and len(value) <= 10 and int(value) <= LARGEST_COUNT):
            raise ZFileError(f"metadata {name}: expected a decimal number, got {value[:40]!r}")
        settings[name] = int(value)
    if not 1 <= settings["num_codebooks"] <= MAX_CODEBOOKS:
        raise ZFileError(f"metadata num_codebooks: expected 1 to {MAX_CODEBOOKS}, got {settings['num_codebooks']}")
    if settings["codebook_size"] < 2 or settings["max_unit_length"] < 1:
        raise ZFileError(f"metadata: expected a codebook_size of 2 or more and a max_unit_length of 1, got {settings}")
    described = _read_documents(metadata.get("documents", ""))
    readers = {name: Reader(name, value) for name, value in tensors.items()}
    width = settings["num_codebooks"]
    code_bits = bits_for(settings["codebook_size"])
    rows = readers["segment_rows"].codes(settings["segments"], checked_bits("segment_bits", settings["segment_bits"]))
    codes, documents, cu_documents = [], [], [0]
    slots = metadata.get("format_version") == str(SLOTS_VERSION)
    for index, entry in enumerate(described):
        try:
            first, last = cu_documents[-1], cu_documents[-1] + read_count(entry, "segments")
            held = int(rows[first:last].sum())
            if last > len(rows) or held != read_count(entry, "ztokens"):
                raise ZFileError(f"expected its {entry['ztokens']} Z-tokens in its segments, got {held}")
            levels = read_count(entry, "levels")
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
    cu_segments = torch.from_numpy(np.concatenate([[0], rows.cumsum()]).astype(np.int32))
    places = None
    if slots:
        own = StoredSlots(
            readers["codes"].rest(),
            metadata,
            cu_segments,
            torch.tensor(cu_documents, dtype=torch.int32),
            [document.tokens for document in documents],
        )
        stored, lengths, places = read_slots(own, settings, read_prior)
    else:
        lengths = torch.from_numpy(
            (readers["unit_lengths"].codes(ztokens, bits_for(settings["max_unit_length"])) + 1).astype(np.int32)
        )
        stored = torch.from_numpy(np.concatenate(codes or [np.zeros((0, width))]).astype(np.int32))
    for reader in readers.values():
        reader.finish()
    batch = make(
        codes=stored,
        unit_lengths=lengths,
        slot_offsets=places,
        cu_segments=cu_segments,
        cu_documents=torch.tensor(cu_documents, dtype=torch.int32),
        documents=documents,
        codec_fingerprint=metadata.get("codec_fingerprint", ""),
        codebook_size=settings["codebook_size"],
        max_unit_length=settings["max_unit_length"],
        precision=metadata.get("precision", "float"),  # older files have none
    ).validate()
    for index, (one, entry) in enumerate(zip(batch, described)):
        for name in ("achieved_ratio", "rate"):
            if not same_number(entry.get(name), getattr(one, name)):
                raise ZFileError(
                    f"document {index}: {name}: expected {getattr(one, name)}, got {str(entry.get(name))[:40]}"
                )
    return batch


def _read_documents(text: str) -> list[dict]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError also for an integer of thousands of digits
        raise ZFileError(f"metadata documents: expected a JSON list, got {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ZFileError("metadata documents: expected a JSON list of objects")
    return entries


def _document_from(entry: dict, levels: int, readers: dict[str, Reader]) -> DocumentInfo:
    budget = entry.get("budget")
    if not is_number(budget):
        raise ZFileError(f"budget: expected a number, got {str(budget)[:40]}")
    byte_length = None if entry.get("byte_length") is None else read_count(entry, "byte_length")
    stated = entry.get("corrections")
    corrections = None
    if stated is not None:
        if not isinstance(stated, dict):
            raise ZFileError(f"corrections: expected an object, got {type(stated).__name__}")
        corrections = _corrections_from(stated, byte_length, readers)
    return DocumentInfo(
        read_count(entry, "tokens"), float(budget), levels, entry.get("sha256"), byte_length, corrections
    )


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
    if corrections.remainder is not None:
        parts["raw"].append(corrections.remainder)
        stated["remainder"] = len(corrections.remainder)
    return stated


def _corrections_from(stated: dict, byte_length: int | None, readers: dict[str, Reader]) -> Corrections:
    count = read_count(stated, "count")
    gap_bits, token_bits = (checked_bits(name, read_count(stated, name)) for name in ("gap_bits", "token_bits"))
    positions = (readers["correction_gaps"].codes(count, gap_bits) + 1).cumsum() - 1
    tokens = readers["correction_tokens"].codes(count, token_bits)
    for name, values in (("positions", positions), ("tokens", tokens)):
        if len(values) and int(values.max()) > LARGEST_COUNT:
            raise ZFileError(f"corrections.{name}: expected 32-bit integers, got {int(values.max())}")
    patch = raw = None
    if "patch" in stated:
        entry = stated["patch"]
        if not isinstance(entry, dict):
            raise ZFileError(f"patch: expected an object, got {type(entry).__name__}")
        replacement = readers["patches"].zlib(read_count(entry, "stored"), read_count(entry, "length"))
        patch = Patch(read_count(entry, "start"), read_count(entry, "end"), replacement)
    if "raw_stored" in stated:
        if byte_length is None:
            raise ZFileError("byte_length: expected a number beside raw bytes, got none")
        raw = readers["raw"].zlib(read_count(stated, "raw_stored"), byte_length)
    remainder = readers["raw"].take(read_count(stated, "remainder")) if "remainder" in stated else None
    as_int32 = [torch.from_numpy(values.astype(np.int32)) for values in (positions, tokens)]
    return Corrections(as_int32[0], as_int32[1], patch, raw, remainder)
