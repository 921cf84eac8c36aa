"""``ztok eval``: what a codec stores and restores, beside what remains without its language model and baselines."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from ztok_fast.cli import common, questions, streams
from ztok_fast.cli.results import environment, write_results

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec

SAMPLE = Path(__file__).resolve().parent.parent / "data" / "demo.txt"
"""A short text in the package."""

_SUFFIXES = (".jsonl", ".jsonl.gz")
_OUTPUTS = (("json", None), ("markdown", None), ("plot", None))


def add_commands(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure a codec on text",
        description="Measure a codec on JSON lines with a `text` field, or on a short text in the package: rate, own "
        "bits, residual bits, efficiency, accuracy and ratio; the same without the language model of the compressor "
        "or the decompressor; and baselines at the same rate. Every file is a family with tables of its own. "
        "With --questions: F1 of the answers to the questions of the rows (fields `question`, and `answer` or "
        "`answers`), from the full text, from Z-tokens, and from as many positions of other kinds.",
    )
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE.jsonl[.gz]|FOLDER",
        help="a folder stands for its files; default: a short text in the package",
    )
    parser.add_argument(
        "-r",
        "--ratio",
        type=float,
        nargs="+",
        metavar="R",
        help="text tokens per Z-token (default: the ratios of the training)",
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        metavar="WAY",
        help="ways to store the text, such as codec 'without compressor' 'token ids' (default: all that the codec has)",
    )
    parser.add_argument(
        "--documents", type=int, default=32, metavar="N", help="maximum number of documents of a file (default: 32)"
    )
    parser.add_argument(
        "--tokens", type=int, default=512, metavar="N", help="maximum number of tokens of each (default: 512)"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="SOURCE", help="leave out the rows of a source"
    )
    parser.add_argument("--questions", action="store_true", help="measure answers to questions about the texts")
    parser.add_argument(
        "--reader",
        metavar="NAME|FOLDER",
        help="with --questions, who reads all but the Z-tokens: a base model, or the inferencer of a codec "
        "(default: that of the codec)",
    )
    parser.add_argument("--json", metavar="OUT", help="also write the results to a JSON file")
    parser.add_argument("--markdown", metavar="OUT", help="also write the tables to a Markdown file")
    parser.add_argument("--plot", metavar="OUT", help="also write a figure (PNG or SVG); needs matplotlib")
    common.add_codec_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    for name in ("documents", "tokens"):
        if getattr(options, name) < 1:
            raise common.UsageError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    files = _files(options.files)
    if options.questions and options.plot:
        raise common.UsageError("--plot: expected none with --questions, whose results are tables")
    outputs = common.check_outputs(options, _OUTPUTS, [str(path) for path in files.values()])
    if options.questions:
        return questions.run(options, files, outputs)
    if options.reader is not None:
        raise common.UsageError("--reader: expected it with --questions alone, nothing else asks a reader")
    codec = common.load_codec(options)

    from ztok_fast.evaluation.plots import draw
    from ztok_fast.evaluation.report import evaluate_families, markdown, ways_to_run
    from ztok_fast.evaluation.scores import has_bleu

    ratios = [codec.config.check_ratio(ratio) for ratio in options.ratio or codec.config.budgets]
    ways = ways_to_run(codec, options.ways)
    families = {name: _texts(codec, path, options) for name, path in files.items()}
    if not files:
        families = {SAMPLE.stem: [_first_tokens(codec, SAMPLE.read_text(encoding="utf-8"), options.tokens)]}
    if not has_bleu():
        streams.say("ztok: note: BLEU is left out, it needs sacrebleu: pip install 'ztok-fast[eval]'")
    tokens = sum(map(len, codec.tokenize([text for texts in families.values() for text in texts])))
    with common.progress_bar(tokens * len(ratios) * len(ways), "evaluate") as progress:
        results = evaluate_families(codec, families, ratios, ways, progress)
    results["codec"] = {"name": Path(options.codec).name, **results["codec"]}
    results["settings"] = {name: getattr(options, name) for name in ("files", "documents", "tokens", "exclude")}
    results["environment"] = environment(options)
    found = markdown(results)
    write_results(results, found, outputs)
    if "plot" in outputs:
        draw(results, outputs["plot"])
    print(found, end="")
    return 0


def _files(names: list[str]) -> dict[str, Path]:
    """The files by the name of their family, those of folders too.

    Raises:
        UsageError: no such file, a folder without one, or two of one name.
    """
    found: dict[str, Path] = {}
    for name in names:
        folder = Path(name)
        own = sorted(p for p in folder.iterdir() if p.name.endswith(_SUFFIXES)) if folder.is_dir() else None
        if own == []:
            raise common.UsageError(f"{name}: expected a folder with .jsonl or .jsonl.gz files, got none in it")
        for path in own or [common.check_input(name)]:
            family = path.name.removesuffix(".gz").removesuffix(".jsonl")
            if family in found:
                raise common.UsageError(f"{path}: expected files of different names, got {found[family]} before")
            found[family] = path
    return found


def _texts(codec: ZTokCodec, path: Path, options: argparse.Namespace) -> list[str]:
    """Texts spread over a file, each cut to its first tokens."""
    from ztok_fast.train.text_data import iter_texts

    texts = [text for text in iter_texts([path], options.exclude) if text.strip()]
    if not texts:
        without = f" outside of {', '.join(options.exclude)}" if options.exclude else ""
        raise common.UsageError(f"{path}: expected at least one row with text{without}, got none")
    stride = max(1, len(texts) // options.documents)
    return [_first_tokens(codec, text, options.tokens) for text in itertools.islice(texts, 0, None, stride)][
        : options.documents
    ]


def _first_tokens(codec: ZTokCodec, text: str, tokens: int) -> str:
    """The beginning of a text that has at most so many tokens."""
    found = codec.tokenizer(text[: 16 * tokens], add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ends = [end for _, end in found["offset_mapping"]]
    return text if len(ends) < tokens and len(text) <= 16 * tokens else text[: ends[min(tokens, len(ends)) - 1]]
