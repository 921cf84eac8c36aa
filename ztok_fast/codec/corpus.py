"""A compressed corpus as Parquet: one row a document, so that any data tool reads it.

Columns: ``id``; ``tokens``, ``budget``, ``levels``, ``digest``, ``byte_length`` as in `DocumentInfo`; ``codes``, the
document's codes as one list, ``levels`` for each Z-token; ``unit_lengths``, one for each Z-token; ``segment_rows``,
Z-tokens of each segment; ``corrections``, exact mode's (null without). What holds for all rows stands in the schema's
metadata. Needs the package pyarrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.documents import MAX_CODEBOOKS, DocumentInfo
from ztok_fast.codec.errors import ZBatchError, ZFileError
from ztok_fast.codec.exact_patch import Patch
from ztok_fast.codec.zbatch import ZBatch
from ztok_fast.files import replace_atomically

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec
    from ztok_fast.codec.passes import Progress

FORMAT = "ztok-corpus"
FORMAT_VERSION = 2
_SETTINGS = ("num_codebooks", "codebook_size", "max_unit_length")
_MAX_CODEBOOK = 1 << 16


class CorpusTotals(NamedTuple):
    """What `compress_corpus` has compressed: documents, their text tokens and their Z-tokens."""

    documents: int
    tokens: int
    ztokens: int


def compress_corpus(
    codec: ZTokCodec,
    source: str | Path,
    target: str | Path,
    ratio: float = 4,
    exact: bool = False,
    *,
    text_column: str = "text",
    id_column: str = "id",
    levels: int | None = None,
    fixed_units: bool | None = None,
    verify: bool = True,
    rows_at_once: int = 64,
    progress: Progress | None = None,
) -> CorpusTotals:
    """Compress the texts of a Parquet file into a Parquet file of codes, a row each and in their order.

    Only ``rows_at_once`` texts are in memory at a time. `read_corpus` reads the result, and `ZTokCodec.decompress`
    takes each of its rows.

    Args:
        codec: the codec; ratio, exact, levels, fixed_units, verify, progress: as in `ZTokCodec.compress`.
        source: Parquet file with one text a row; target: file to write, which appears once it is whole.
        text_column: column with the texts.
        id_column: column with an identifier of each row; where there is none, rows are numbered from 0.

    Raises:
        ZFileError: the source is missing, is no Parquet file, or lacks a text in a row.
        ZBatchError: the source has no row.
        ImportError: pyarrow is not installed.
    """
    documents = tokens = ztokens = 0

    def rows() -> Iterator[tuple[str, ZBatch]]:
        nonlocal documents, tokens, ztokens
        for ids, texts in read_texts(source, text_column, id_column, rows_at_once):
            z = codec.compress(
                texts, ratio, exact, levels=levels, fixed_units=fixed_units, verify=verify, progress=progress
            )
            documents, tokens, ztokens = documents + len(z), tokens + z.tokens, ztokens + z.ztokens
            yield from zip(ids, z)

    write_corpus(target, rows())
    return CorpusTotals(documents, tokens, ztokens)


def read_texts(
    path: str | Path, text_column: str = "text", id_column: str = "id", rows_at_once: int = 64
) -> Iterator[tuple[list[str], list[str]]]:
    """Stream identifiers and texts of a Parquet file, ``rows_at_once`` at a time; arguments as in `compress_corpus`.

    Raises:
        ZFileError: the file is missing, is no Parquet file, or lacks a text in a row.
        ImportError: pyarrow is not installed.
    """
    arrow, parquet = arrow_modules()
    path, number = Path(path), 0
    if rows_at_once < 1:
        raise ZFileError(f"rows_at_once: expected at least 1, got {rows_at_once}")
    if not path.is_file():
        raise ZFileError(f"{path}: expected an existing Parquet file, got none")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                raise ZFileError(f"{path}: expected a column {text_column!r} with the texts, got {names}")
            columns = [text_column, id_column] if id_column in names else [text_column]
            for batch in file.iter_batches(batch_size=rows_at_once, columns=columns):
                texts = batch.column(text_column).to_pylist()
                ids = batch.column(id_column).to_pylist() if id_column in names else range(number, number + len(texts))
                for row, text in enumerate(texts, start=number):
                    if not isinstance(text, str):
                        raise ZFileError(f"{path}, row {row}: {text_column}: expected a string, got {text!r:.40}")
                number += len(texts)
                yield [str(own) for own in ids], texts
    except (arrow.ArrowException, OSError) as error:
        raise ZFileError(f"{path}: not a whole Parquet file: {error}") from error


def write_corpus(path: str | Path, rows: Iterable[tuple[str, ZBatch]], rows_per_group: int = 1024) -> int:
    """Stream ``(id, batch of one document)`` rows into a Parquet file; returns how many.

    For a batch of several documents: ``write_corpus(path, zip(ids, batch))``. Codes are stored as
    uint16. The file appears only once it is whole.

    Raises:
        ZBatchError: no row is given, a row is no valid batch of one document, or rows are of different codecs.
        ImportError: pyarrow is not installed.
    """
    arrow, parquet = arrow_modules()
    if rows_per_group < 1:
        raise ZBatchError(f"rows_per_group: expected at least 1, got {rows_per_group}")
    iterator = iter(rows)
    head = next(iterator, None)
    if head is None:
        raise ZBatchError("rows: expected at least one (id, batch of one document), got none")
    first = head[1]
    if first.codebook_size > _MAX_CODEBOOK:
        raise ZBatchError(f"codebook_size: expected at most {_MAX_CODEBOOK} in a corpus, got {first.codebook_size}")
    metadata = {name: str(getattr(first, name)) for name in _SETTINGS}
    metadata |= {
        "codec_fingerprint": first.codec_fingerprint,
        "precision": first.precision,
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
    }
    schema = _schema(arrow).with_metadata(metadata)
    iterator = chain([head], iterator)
    count = 0
    with replace_atomically(path) as temporary, parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        while group := [_to_row(identifier, one, first) for identifier, one in islice(iterator, rows_per_group)]:
            writer.write_table(arrow.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


def read_corpus(path: str | Path, rows_at_once: int = 256) -> Iterator[tuple[str, ZBatch]]:
    """Stream the rows of a corpus as ``(id, batch of one document)``, each checked.

    Raises:
        ZFileError: the file is missing, no compressed corpus, of another version, or a row is not valid.
        ImportError: pyarrow is not installed.
    """
    arrow, parquet = arrow_modules()
    path = Path(path)
    if not path.is_file():
        raise ZFileError(f"{path}: expected an existing Parquet file, got none")
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            settings = _read_settings(arrow, schema, path)
            number = 0
            for group in file.iter_batches(batch_size=rows_at_once):
                for row in group.to_pylist():
                    yield row["id"], _from_row(row, settings, f"{path}, row {number}")
                    number += 1
    except (arrow.ArrowException, OSError) as error:
        raise ZFileError(f"{path}: not a whole Parquet file: {error}") from error


def arrow_modules():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "a compressed corpus needs the package pyarrow: pip install ztok-fast[corpus], or pip install pyarrow"
        ) from error
    return pyarrow, pyarrow.parquet


def _schema(arrow):
    def listed(kind):
        return arrow.list_(arrow.field("element", kind, nullable=False))

    corrections = arrow.struct(
        [
            ("positions", listed(arrow.int32())),
            ("tokens", listed(arrow.int32())),
            ("patch", arrow.struct([("start", arrow.int64()), ("end", arrow.int64()), ("bytes", arrow.binary())])),
            ("raw", arrow.binary()),
            ("remainder", arrow.binary()),
        ]
    )
    return arrow.schema(
        [
            arrow.field("id", arrow.string(), nullable=False),
            arrow.field("tokens", arrow.int64(), nullable=False),
            arrow.field("budget", arrow.float64(), nullable=False),
            arrow.field("levels", arrow.int32(), nullable=False),
            arrow.field("digest", arrow.string()),
            arrow.field("byte_length", arrow.int64()),
            arrow.field("codes", listed(arrow.uint16()), nullable=False),
            arrow.field("unit_lengths", listed(arrow.int32()), nullable=False),
            arrow.field("segment_rows", listed(arrow.int32()), nullable=False),
            arrow.field("corrections", corrections),
        ]
    )


def _to_row(identifier: str, one: ZBatch, first: ZBatch) -> dict:
    if not isinstance(identifier, str):
        raise ZBatchError(f"id: expected a string, got {identifier!r}")
    if len(one) != 1:
        raise ZBatchError(f"row {identifier!r}: expected a batch of one document, got {len(one)}")
    one.validate()
    first.check_codec(one.codec_fingerprint)
    for name in _SETTINGS:
        if getattr(one, name) != getattr(first, name):
            raise ZBatchError(f"row {identifier!r}: expected {name} {getattr(first, name)}, got {getattr(one, name)}")
    info = one.documents[0]
    return {
        "id": identifier,
        "tokens": info.tokens,
        "budget": info.budget,
        "levels": info.levels,
        "digest": info.digest,
        "byte_length": info.byte_length,
        "codes": one.codes[:, : info.levels].reshape(-1).tolist(),
        "unit_lengths": one.unit_lengths.tolist(),
        "segment_rows": one.cu_segments.diff().tolist(),
        "corrections": _corrections_to(info.corrections),
    }


def _corrections_to(corrections: Corrections | None) -> dict | None:
    if corrections is None:
        return None
    patch = corrections.patch
    return {
        "positions": corrections.positions.tolist(),
        "tokens": corrections.tokens.tolist(),
        "patch": None if patch is None else {"start": patch.start, "end": patch.end, "bytes": patch.replacement},
        "raw": corrections.raw,
        "remainder": corrections.remainder,
    }


def _read_settings(arrow, schema, path: Path) -> dict:
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    if metadata.get("format") != FORMAT or metadata.get("format_version") != str(FORMAT_VERSION):
        raise ZFileError(
            f"{path}: expected a compressed corpus of format version {FORMAT_VERSION}, got format "
            f"{metadata.get('format')!r}, version {metadata.get('format_version')!r}"
        )
    if not schema.equals(_schema(arrow)):
        raise ZFileError(f"{path}: expected the columns {_schema(arrow).names}, got other columns or types")
    settings: dict = {
        "codec_fingerprint": metadata.get("codec_fingerprint", ""),
        "precision": metadata.get("precision", "float"),  # older files have none
    }
    for name in _SETTINGS:
        value = metadata.get(name, "")
        if not (value.isascii() and value.isdigit() and len(value) <= 9):
            raise ZFileError(f"{path}: metadata {name}: expected a decimal number, got {value[:40]!r}")
        settings[name] = int(value)
    if not 1 <= settings["num_codebooks"] <= MAX_CODEBOOKS:
        raise ZFileError(f"{path}: num_codebooks: expected 1 to {MAX_CODEBOOKS}, got {settings['num_codebooks']}")
    return settings


def _from_row(row: dict, settings: dict, where: str) -> ZBatch:
    width, levels, ztokens = settings["num_codebooks"], row["levels"], len(row["unit_lengths"])
    if not 1 <= levels <= width or len(row["codes"]) != ztokens * levels:
        raise ZFileError(
            f"{where}: expected {ztokens} Z-tokens of 1 to {width} levels, got {len(row['codes'])} codes "
            f"and {levels} levels"
        )
    try:
        corrections = _corrections_from(row["corrections"])
        codes = np.array(row["codes"], np.int32).reshape(ztokens, levels)
        rows = np.array(row["segment_rows"], np.int64)
        return ZBatch(
            codes=torch.from_numpy(np.pad(codes, ((0, 0), (0, width - levels)), constant_values=-1)),
            unit_lengths=torch.tensor(row["unit_lengths"], dtype=torch.int32),
            cu_segments=torch.from_numpy(np.concatenate([[0], rows.cumsum()]).astype(np.int32)),
            cu_documents=torch.tensor([0, len(rows)], dtype=torch.int32),
            documents=[
                DocumentInfo(row["tokens"], row["budget"], levels, row["digest"], row["byte_length"], corrections)
            ],
            codec_fingerprint=settings["codec_fingerprint"],
            codebook_size=settings["codebook_size"],
            max_unit_length=settings["max_unit_length"],
            precision=settings["precision"],
        ).validate()
    except ZBatchError as error:
        raise ZFileError(f"{where}: {error}") from error


def _corrections_from(row: dict | None) -> Corrections | None:
    if row is None:
        return None
    if row["positions"] is None or row["tokens"] is None:
        raise ZBatchError("corrections: expected lists of positions and tokens, got null")
    patch = row["patch"]
    if patch is not None and None in patch.values():
        raise ZBatchError("corrections.patch: expected start, end and bytes, got null among them")
    return Corrections(
        torch.tensor(row["positions"], dtype=torch.int32),
        torch.tensor(row["tokens"], dtype=torch.int32),
        None if patch is None else Patch(patch["start"], patch["end"], patch["bytes"]),
        row["raw"],
        row["remainder"],
    )
