"""Coded units in Parquet: a row each, for corpora that data tools read and several machines share.

Columns: ``id``; ``bytes``, of the text; ``coded``, a whole file of coded units of one document (docs/file-format.md).
Any row can be read alone. Needs the package pyarrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ztok_fast.codec.base_model import BaseModel, load_base
from ztok_fast.codec.coded import DEFAULT_BASE, Progress, TextCoder
from ztok_fast.codec.coded_file import block_bytes, coder_of, texts_of
from ztok_fast.codec.coded_writer import coded_bytes
from ztok_fast.codec.corpus import arrow_modules, read_texts
from ztok_fast.codec.errors import CodecError, ZFileError
from ztok_fast.files import replace_atomically

FORMAT = b"ztok-coded-corpus"
ROWS_AT_ONCE = 1024


class CodedTotals(NamedTuple):
    """What `compress_coded_corpus` has compressed: documents, their bytes of text, and bytes of coded units."""

    documents: int
    text: int
    coded: int


def compress_coded_corpus(
    coder: TextCoder,
    source: str | Path,
    target: str | Path,
    *,
    text_column: str = "text",
    id_column: str = "id",
    verify: bool = True,
    progress: Progress | None = None,
) -> CodedTotals:
    """Compress the texts of a Parquet file into a Parquet file of coded units, a row each and in their order.

    Args:
        target: file to write, which appears once it is whole.
        text_column, id_column: as in `compress_corpus`.
        verify, progress: as in `write_coded`.

    Raises:
        ZFileError: the source is missing, is no Parquet file, or lacks a text in a row.
        ImportError: pyarrow is not installed.
    """
    arrow, parquet = arrow_modules()
    documents = size = coded = 0
    schema = _schema(arrow)
    with (
        replace_atomically(target) as temporary,
        parquet.ParquetWriter(
            temporary, schema, compression={"id": "zstd", "bytes": "zstd", "coded": "none"}
        ) as writer,
    ):
        for ids, read in read_texts(source, text_column, id_column, ROWS_AT_ONCE):
            texts = [text.encode() for text in read]
            files: list[bytes] = []
            for begin, end in batches(list(map(len, texts)), block_bytes(coder)):
                files += coded_bytes(texts[begin:end], coder, verify)
                if progress:
                    progress(sum(map(len, texts[begin:end])))
            writer.write_table(arrow.table([ids, list(map(len, texts)), files], schema=schema))
            documents += len(texts)
            size, coded = size + sum(map(len, texts)), coded + sum(map(len, files))
    return CodedTotals(documents, size, coded)


def read_coded_corpus(
    path: str | Path,
    base: BaseModel | str | Path | None = None,
    precision: str | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, bytes]]:
    """Stream the rows of a corpus as ``(id, text)``.

    Args:
        base: model that coded it, loaded or by name; ``None`` is mini-base.
        precision: of the coder, ``None`` for the one that the rows name.

    Raises:
        ZFileError: the file is missing, no corpus of coded units, of another coder, or a row is damaged.
        ImportError: pyarrow is not installed.
    """
    arrow, parquet = arrow_modules()
    path, number = Path(path), 0
    if not path.is_file():
        raise ZFileError(f"{path}: expected an existing Parquet file, got none")
    base = base if isinstance(base, BaseModel) else load_base(str(base or DEFAULT_BASE))
    coder: TextCoder | None = None
    try:
        with parquet.ParquetFile(path) as file:
            if not file.schema_arrow.equals(_schema(arrow)) or not _is_coded(file.schema_arrow):
                raise ZFileError(f"{path}: expected a corpus of coded units, got {file.schema_arrow.names}")
            for group in file.iter_batches(batch_size=ROWS_AT_ONCE):
                ids, sizes, files = (group.column(name).to_pylist() for name in ("id", "bytes", "coded"))
                try:
                    coder = coder or coder_of(files[0], base, precision)
                except ZFileError as error:
                    raise ZFileError(f"{path}, row {number}: {error}") from error
                for begin, end in batches(sizes, block_bytes(coder)):
                    try:
                        texts = texts_of(files[begin:end], coder)
                    except ZFileError as error:
                        raise ZFileError(f"{path}, from row {number + begin} on: {error}") from error
                    if progress:
                        progress(sum(map(len, texts)))
                    yield from zip(ids[begin:end], texts)
                number += len(ids)
    except (arrow.ArrowException, OSError) as error:
        raise ZFileError(f"{path}: not a whole Parquet file: {error}") from error


class CodedBatches:
    """Codes the texts of batches of rows, as Ray Data's ``map_batches`` takes it: one object for each worker.

    A batch is a dict of columns. The column of texts is replaced by ``bytes`` and ``coded``; with ``decode`` the latter
    two by the texts. Others stay as they are.

    Args:
        base, precision, context, window: as in `TextCoder.from_pretrained`.
        text_column: the texts, str.
    """

    def __init__(self, decode: bool = False, text_column: str = "text", verify: bool = True, **settings: Any) -> None:
        self.coder = TextCoder.from_pretrained(**settings)
        self.decode, self.text_column, self.verify = decode, text_column, verify

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with its texts coded, or decoded.

        Raises:
            CodecError: a column is missing; ZFileError: a row is damaged.
        """
        wanted = "coded" if self.decode else self.text_column
        if wanted not in batch:
            raise CodecError(f"batch: expected a column {wanted!r}, got {list(batch)}")
        rest = {name: column for name, column in batch.items() if name not in (wanted, "bytes", "coded")}
        if self.decode:
            texts: list[bytes] = []
            files = list(batch["coded"])
            for begin, end in batches(list(map(len, files)), block_bytes(self.coder) // 4):
                texts += texts_of(files[begin:end], self.coder)
            return rest | {self.text_column: [text.decode() for text in texts]}
        read = [str(text).encode() for text in batch[wanted]]
        found: list[bytes] = []
        for begin, end in batches(list(map(len, read)), block_bytes(self.coder)):
            found += coded_bytes(read[begin:end], self.coder, self.verify)
        return rest | {"bytes": list(map(len, read)), "coded": found}


def batches(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Stretches of rows, each of at most so many bytes or of one row."""
    begin = total = 0
    for index, size in enumerate(sizes):
        if index > begin and total + size > most:
            yield begin, index
            begin, total = index, 0
        total += size
    if begin < len(sizes):
        yield begin, len(sizes)


def is_coded_corpus(path: str | Path) -> bool:
    """Whether a Parquet file holds coded units.

    Raises:
        ZFileError: it is no whole Parquet file.
        ImportError: pyarrow is not installed.
    """
    arrow, parquet = arrow_modules()
    try:
        return _is_coded(parquet.read_schema(path))
    except (arrow.ArrowException, OSError) as error:
        raise ZFileError(f"{path}: not a whole Parquet file: {error}") from error


def _is_coded(schema) -> bool:
    return (schema.metadata or {}).get(b"format") == FORMAT


def _schema(arrow):
    fields = (("id", arrow.string()), ("bytes", arrow.int64()), ("coded", arrow.large_binary()))
    columns = [arrow.field(name, kind, nullable=False) for name, kind in fields]
    return arrow.schema(columns).with_metadata({b"format": FORMAT, b"format_version": b"1"})
