"""``ztok generate`` and ``ztok answer``: commands that work on Z-tokens without decompressing them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ztok_fast.cli import coded, common, streams

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec
    from ztok_fast.codec.zbatch import ZBatch


def add_commands(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a .ztok file in Z-space",
        description="Generate new Z-tokens after those of every document. "
        "Print the decompressed text, or save the Z-tokens.",
    )
    parser.add_argument("file", metavar="FILE.ztok")
    parser.add_argument(
        "--max-new-ztokens", type=int, default=32, metavar="N", help="maximum number of new Z-tokens (default: 32)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 (default) picks the most likely codes"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="probability mass of nucleus sampling (default: 1, all codes)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    parser.add_argument(
        "-o", "--output", metavar="OUT.ztok", help="save the new Z-tokens instead of printing their text"
    )
    common.add_codec_arguments(parser)
    parser.set_defaults(run=generate)

    parser = commands.add_parser(
        "answer",
        help="answer a question from a .ztok file",
        description="Answer a question from the Z-tokens of every document.",
    )
    parser.add_argument("file", metavar="FILE.ztok")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="maximum length of an answer (default: 32)"
    )
    common.add_codec_arguments(parser)
    parser.set_defaults(run=answer)


def generate(options: argparse.Namespace) -> int:
    output = None if options.output is None else common.check_output(options.output, ".ztok", [options.file])
    z, codec = _load(options, "generate")
    new = codec.generate(
        z, options.max_new_ztokens, temperature=options.temperature, top_p=options.top_p, seed=options.seed
    )
    if output is None:
        _print_documents(codec.decompress_bytes(new))
        return 0
    codec.save(new, output)
    print(f"{output}: {new.ztokens:,} new Z-tokens that stand for {new.tokens:,} tokens")
    return 0


def answer(options: argparse.Namespace) -> int:
    if any("\ud800" <= character <= "\udfff" for character in options.question):
        raise common.UsageError("QUESTION: expected text in the terminal's encoding, got other bytes")
    z, codec = _load(options, "answer")
    answers = codec.answer(z, [options.question] * len(z), max_new_tokens=options.max_new_tokens)
    _print_documents([text.encode("utf-8", "replace") for text in answers])
    return 0


def _load(options: argparse.Namespace, what: str) -> tuple[ZBatch, ZTokCodec]:
    """The Z-tokens of a file, or of the text of one that holds coded units."""
    if common.form_name(options.file) == "coded":
        codec = common.load_codec(options)
        return coded.learned(options, codec, what), codec
    z = common.load_batch(options.file, options)
    return z, common.load_codec(options)


def _print_documents(documents: list[bytes]) -> None:
    """Print every document on its own lines, under its number if there are several."""
    for index, data in enumerate(documents):
        if len(documents) > 1:
            print(f"document {index}:")
        streams.write(data + b"\n")
