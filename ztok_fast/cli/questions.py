"""``ztok eval --questions``: answers from Z-tokens beside answers from the text."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ztok_fast.cli import common, streams
from ztok_fast.cli.results import environment, write_results

if TYPE_CHECKING:
    from ztok_fast.codec.base_model import BaseModel
    from ztok_fast.codec.codec import ZTokCodec
    from ztok_fast.evaluation.questions import Item


def run(options: argparse.Namespace, files: Mapping[str, Path], outputs: Mapping[str, Path]) -> int:
    if not files:
        raise common.UsageError("--questions: expected files whose rows have a question and an answer, got none")
    codec = common.load_codec(options)

    from ztok_fast.evaluation.answer_report import evaluate_question_families, markdown
    from ztok_fast.evaluation.answers import answer_ways_to_run

    ratios = [codec.config.check_ratio(ratio) for ratio in options.ratio or codec.config.budgets]
    ways = answer_ways_to_run(codec, options.ways)
    families = {name: _items(codec, path, options) for name, path in files.items()}
    reader = _reader(options)
    total = sum(map(len, families.values())) * len(ratios) * len(ways)
    with common.progress_bar(total, "answer", " questions") as progress:
        results = evaluate_question_families(codec, families, ratios, ways, reader, progress)
    results["codec"] = {"name": Path(options.codec).name, **results["codec"]}
    results["settings"] = {
        name: getattr(options, name) for name in ("files", "documents", "tokens", "exclude", "reader")
    }
    results["environment"] = environment(options)
    found = markdown(results)
    write_results(results, found, outputs)
    print(found, end="")
    return 0


def _items(codec: ZTokCodec, path: Path, options: argparse.Namespace) -> list[Item]:
    """Questions spread over a file, of those whose text is not too long; an answer may stand in any part of a text."""
    from ztok_fast.evaluation.questions import items_of
    from ztok_fast.train.text_data import iter_rows

    excluded = tuple(options.exclude)
    rows = [row for row in iter_rows(path) if not (excluded and str(row.get("source", "")).startswith(excluded))]
    try:
        items = items_of(rows)
    except ValueError as error:
        raise common.UsageError(f"{path}: {error}") from error
    lengths = [len(tokens) for tokens in codec.tokenize([item.text for item in items])]
    short = [item for item, length in zip(items, lengths) if 0 < length <= options.tokens]
    if not short:
        raise common.UsageError(
            f"{path}: expected a text of at most {options.tokens} tokens, got none under {min(lengths)}; see --tokens"
        )
    if len(short) < len(items):
        left = len(items) - len(short)
        streams.say(f"ztok: note: {path}: {left:,} of {len(items):,} questions are left out, see --tokens")
    return short[:: max(1, len(short) // options.documents)][: options.documents]


def _reader(options: argparse.Namespace) -> str | BaseModel | ZTokCodec | None:
    """A codec where the name is that of one, else the name of a base model."""
    from ztok_fast.codec.codec import ZTokCodec
    from ztok_fast.codec.shipped import codec_folder

    name = options.reader
    settings = codec_folder(name) / "config.json" if name else None
    # A base model's folder has settings too, but they name no base.
    if settings is None or not settings.is_file() or "base_fingerprint" not in settings.read_text(encoding="utf-8"):
        return name
    return ZTokCodec.from_pretrained(name, engine=options.engine)
