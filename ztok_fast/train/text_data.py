"""Reading text corpora: JSON lines, optionally gzip-compressed, one ``text`` field a row."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path


class DataError(ValueError):
    """A training or evaluation file cannot be read as JSON lines with a ``text`` field."""


def iter_rows(path: str | Path) -> Iterator[dict]:
    """Stream the rows of one ``.jsonl`` or ``.jsonl.gz`` file.

    Raises:
        DataError: the file is missing, is not JSON lines, or a row has no string field ``text``;
            the message names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data file {path}: expected an existing .jsonl or .jsonl.gz file, got none")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse(path, number, line)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"data file {path}: cannot be read as UTF-8 JSON lines: {error}") from error


def _parse(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"data file {path}, line {number}: expected a JSON object, got {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f"data file {path}, line {number}: expected a string field 'text', got none")
    return row


def iter_texts(paths: Iterable[str | Path], exclude_sources: Iterable[str] = ()) -> Iterator[str]:
    """Stream the ``text`` fields of several files, in order.

    Rows whose ``source`` begins with one of ``exclude_sources`` are left out, which is how text
    under a licence that does not fit is kept from a training run.
    """
    excluded = tuple(exclude_sources)
    for path in paths:
        for row in iter_rows(path):
            if excluded and str(row.get("source", "")).startswith(excluded):
                continue
            yield row["text"]
