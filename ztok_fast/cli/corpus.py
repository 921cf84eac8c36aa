"""Corpora in Parquet on the command line: their texts, and decompressing those of Z-tokens or coded units."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from ztok_fast.cli import common, streams

Result = TypeVar("Result")
ROWS_AT_ONCE = 256


def is_parquet(path: str) -> bool:
    """Whether a file exists and begins as Parquet."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as stream:
        return stream.read(4) == b"PAR1"


def or_usage_error(call: Callable[[], Result]) -> Result:
    """What ``call`` returns; that pyarrow is missing is a mistake that a user can mend."""
    try:
        return call()
    except ImportError as error:
        raise common.UsageError(str(error)) from error


def decompress(options: argparse.Namespace) -> int:
    """A Parquet file of Z-tokens or of coded units to one of texts, or to text."""
    started, output = time.perf_counter(), None if options.output == "-" else Path(options.output)
    wanted = options.document
    if wanted is not None and wanted < 0:
        raise common.UsageError(f"--document: expected 0 or more, got {wanted}")
    if output is not None:
        suffix = ".parquet" if wanted is None else None
        common.check_output(output, suffix=suffix, inputs=[options.file])
    with common.progress_bar(None, "decompress", unit="B") as progress:
        rows = or_usage_error(lambda: _rows(options, progress))
        if wanted is not None:
            rows = islice(rows, wanted, wanted + 1)
            first = next(rows, None)
            if first is None:
                raise common.UsageError(f"--document: expected a row of {options.file}, got {wanted}: it has fewer")
            rows = chain([first], rows)
        if output is None:
            for _, text in rows:
                streams.write(text)
            return 0
        from ztok_fast.files import replace_atomically

        with replace_atomically(output) as temporary:
            if wanted is not None:
                size = temporary.write_bytes(next(rows)[1])
            else:
                size = _write_texts(temporary, rows, options.file)
    print(f"{output}: {size:,} bytes from {options.file}, {time.perf_counter() - started:.1f} s")
    sys.stdout.flush()
    return 0


def _rows(options: argparse.Namespace, progress: Callable[[int], None]) -> Iterator[tuple[str, bytes]]:
    from ztok_fast.codec.coded_corpus import is_coded_corpus, read_coded_corpus
    from ztok_fast.codec.corpus import read_corpus

    if is_coded_corpus(options.file):
        return read_coded_corpus(options.file, *common.base_of(options), progress)
    codec = common.load_codec(options)

    def texts() -> Iterator[tuple[str, bytes]]:
        for identifier, z in read_corpus(options.file):
            (text,) = codec.decompress_bytes(z)
            progress(len(text))
            yield identifier, text

    return texts()


def _write_texts(path: Path, rows: Iterator[tuple[str, bytes]], source: str) -> int:
    """Write identifiers and texts as Parquet; bytes of text."""
    import pyarrow
    import pyarrow.parquet

    size = 0
    schema = pyarrow.schema([("id", pyarrow.string()), ("text", pyarrow.large_string())])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(islice(rows, ROWS_AT_ONCE)):
            try:
                texts = [text.decode() for _, text in group]
            except UnicodeDecodeError as error:
                raise common.UsageError(
                    f"{source}: expected texts in UTF-8 for a Parquet file, got other bytes; --document N writes one"
                ) from error
            writer.write_table(pyarrow.table([[own for own, _ in group], texts], schema=schema))
            size += sum(len(text) for _, text in group)
    return size
