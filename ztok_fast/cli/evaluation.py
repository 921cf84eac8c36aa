"""``ztok eval``: how well a codec restores text, per budget, kind of units and number of residual levels."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ztok_fast.cli import common, report

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec

SAMPLE = Path(__file__).resolve().parent.parent / "data" / "demo.txt"
"""A short text in the package."""


def add_commands(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure a codec on text",
        description="Measure a codec on JSON lines with a `text` field, or on a short text in the package: accuracy "
        "teacher-forced and free-running, ratio, rate, and the base model without Z-tokens.",
    )
    parser.add_argument("files", nargs="*", metavar="FILE.jsonl[.gz]", help="default: a short text in the package")
    parser.add_argument(
        "-r",
        "--ratio",
        type=float,
        nargs="+",
        metavar="R",
        help="text tokens per Z-token (default: the ratios of the training)",
    )
    parser.add_argument(
        "--documents", type=int, default=32, metavar="N", help="maximum number of documents (default: 32)"
    )
    parser.add_argument(
        "--tokens", type=int, default=512, metavar="N", help="maximum number of tokens of each (default: 512)"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="SOURCE", help="leave out the rows of a source"
    )
    parser.add_argument("--json", metavar="OUT", help="also write the results to a JSON file")
    common.add_codec_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    for name in ("documents", "tokens"):
        if getattr(options, name) < 1:
            raise common.UsageError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    for name in options.files:
        common.check_input(name)
    output = None if options.json is None else common.check_output(options.json, inputs=options.files)
    codec = common.load_codec(options)
    budgets = [codec.config.check_ratio(ratio) for ratio in options.ratio or codec.config.budgets]
    documents = _documents(codec, options)
    result = evaluate_variants(codec, documents, budgets)
    if output is not None:
        from ztok_fast.files import replace_atomically

        with replace_atomically(output) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(render(result))
    return 0


def _documents(codec: ZTokCodec, options: argparse.Namespace) -> list[list[int]]:
    from ztok_fast.train.evaluate import dev_documents

    if options.files:
        documents = dev_documents(options.files, codec.tokenizer, options.documents, options.tokens, options.exclude)
    else:
        documents = [common.tokenize(codec, [SAMPLE.read_text(encoding="utf-8")])[0][: options.tokens]]
    if not documents:
        raise common.UsageError(f"{', '.join(options.files)}: expected at least one row with text, got none")
    return documents


def evaluate_variants(codec: ZTokCodec, documents: list[list[int]], budgets: list[float]) -> dict:
    """Learned units at every number of residual levels, and fixed units as the baseline.

    Returns:
        ``codec_fingerprint``, ``base_model``, ``documents`` and ``tokens`` (counts), ``base`` (the base model
        without Z-tokens: bits per token, accuracy) and ``rows``: budget, units, levels and what
        `evaluate` measures there.
    """
    from ztok_fast.train.evaluate import UNIT_KINDS, evaluate, unit_kinds

    all_levels, kinds = codec.config.num_codebooks, unit_kinds(codec.config)
    variants = [*((units, all_levels) for units in kinds), *((kinds[0], n) for n in range(all_levels - 1, 0, -1))]
    documents = [document[: codec.config.section_tokens] for document in documents]
    tokens = sum(map(len, documents))
    measured, base = {}, {}
    with common.progress_bar(tokens * len(variants) * len(budgets), "evaluate") as progress:
        for units, levels in variants:
            found = evaluate(codec, documents, budgets, fixed_units=UNIT_KINDS[units], levels=levels)
            base = found["base"]
            for budget in budgets:
                measured[budget, units, levels] = found[f"{budget:g}"]
            progress(tokens * len(budgets))
    rows = [
        {"budget": budget, "units": units, "levels": levels, **measured[budget, units, levels]}
        for budget in budgets
        for units, levels in variants
    ]
    return {
        "codec_fingerprint": codec.fingerprint,
        "base_model": codec.base.name,
        "documents": len(documents),
        "tokens": tokens,
        "base": base,
        "rows": rows,
    }


def render(result: dict) -> str:
    """The table that ``ztok eval`` prints."""
    header = (
        "budget",
        "units",
        "levels",
        "free-running",
        "teacher-forced",
        "ratio",
        "rate",
        "loss bits",
        "length~surprisal",
    )
    rows = [
        [
            f"{row['budget']:g}",
            row["units"],
            str(row["levels"]),
            report.percent(row["free_running"]),
            report.percent(row["teacher_forced"]),
            report.number(row["ratio"]),
            report.number(row["rate"]),
            report.number(row["loss_bits"]),
            report.number(row["length_surprisal_correlation"]),
        ]
        for row in result["rows"]
    ]
    return (
        f"{result['documents']:,} documents, {result['tokens']:,} tokens; the base model without Z-tokens: "
        f"{report.number(result['base']['bits_per_token'])} bits per token, "
        f"{report.percent(result['base']['accuracy'])} of next tokens right\n\n"
        + report.table(header, rows, left=2)
        + "\n\nrate and loss in bits per text token; length~surprisal: correlation of a unit's length with the "
        "mean\nsurprisal of its tokens, negative where dense text gets shorter units"
    )
