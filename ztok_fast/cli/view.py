"""``ztok view``: one HTML page that shows what the Z-tokens of a text hold, and what is guessed, at several ratios."""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ztok_fast.cli import common, report, streams
from ztok_fast.files import replace_atomically

if TYPE_CHECKING:
    from ztok_fast.cli.measure import Measurement
    from ztok_fast.codec.codec import ZTokCodec

TEMPLATE = Path(__file__).resolve().parent.parent / "data" / "view.html"
RATIOS = (2.0, 4.0, 8.0, 16.0)

MOST_TOKENS = 50_000
"""Tokens shown where nothing else is asked for: some 100 kB of text, a page of a few MB."""


def add_commands(commands) -> None:
    parser = commands.add_parser(
        "view",
        help="show on an HTML page what the Z-tokens of a text hold",
        description="Compress a text at several ratios, decompress it, and write one HTML page that needs nothing "
        "else. It shows tokens coloured by surprisal, units, the tokens that Z-tokens name, and wrong guesses.",
    )
    parser.add_argument("file", metavar="FILE", help="a text (- reads stdin), or a .ztok file of coded units")
    parser.add_argument(
        "--document", type=int, metavar="N", help="of a file of coded units: the document, counted from 0 (default: 0)"
    )
    parser.add_argument("-o", "--output", metavar="VIEW.html", help="default: FILE.html beside FILE")
    parser.add_argument(
        "-r",
        "--ratio",
        type=float,
        nargs="+",
        metavar="R",
        help="text tokens per Z-token (default: 2 4 8 16, as far as the codec gives them)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=MOST_TOKENS,
        metavar="N",
        help=f"maximum number of tokens to show (default: {MOST_TOKENS:,}; 0 for all)",
    )
    common.add_codec_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.tokens < 0:
        raise common.UsageError(f"--tokens: expected 0 or more, got {options.tokens}")
    if options.output is None and options.file == "-":
        raise common.UsageError("-o: expected a file name ending in .html for the page of stdin, got none")
    inputs = [] if options.file == "-" else [options.file]
    output = common.check_output(options.output or f"{options.file}.html", suffix=".html", inputs=inputs)
    form = common.form_name(options.file)
    if form == "coded":
        from ztok_fast.cli import view_coded

        return _write(output, view_coded.page_data(options), options.file)
    if form == "learned":
        raise common.UsageError(f"{options.file}: expected a text or a file of coded units, got learned units")
    if options.document is not None:
        raise common.UsageError("--document: expected a file of coded units with it, got a text")
    data = common.read_bytes(options.file)
    if not data:
        raise common.UsageError(f"{options.file}: expected a text to show, got an empty file")
    codec = common.load_codec(options)
    ratios = _ratios(codec, options.ratio)
    text, notices = _shown_text(codec, data, options.tokens)
    from ztok_fast.cli.measure import measure

    tokens = len(codec.tokenize([text])[0])
    measurements = []
    with common.progress_bar(tokens * len(ratios), "measure") as progress:
        for ratio in ratios:
            measurements.append(measure(codec, text, ratio))
            progress(tokens)
    name = "standard input" if options.file == "-" else common.shown_name(options.file)
    page = page_data(codec, name, common.shown_name(options.codec), measurements, notices)
    return _write(output, page, options.file)


def _write(output: Path, data: dict, source: str) -> int:
    page = render(data).encode()
    with replace_atomically(output) as temporary:
        temporary.write_bytes(page)
    at = ", ".join(f"{own['ratio']:g}" for own in data["ratios"])
    print(f"{output}: {len(data['tokens']):,} tokens at r = {at}; {len(page):,} bytes")
    sys.stdout.flush()
    for notice in data["notices"]:
        streams.say(f"ztok: {source}: {notice}")
    return 0


def _ratios(codec: ZTokCodec, asked: Sequence[float] | None) -> list[float]:
    """The ratios in rising order, each once; those that nobody asked for only where the codec can give them."""
    if asked is None:
        asked = [ratio for ratio in RATIOS if ratio <= codec.config.max_unit_length] or [1.0]
    return sorted({codec.config.check_ratio(ratio) for ratio in asked})


def _shown_text(codec: ZTokCodec, data: bytes, most: int) -> tuple[str, list[str]]:
    """The text to show, of about ``most`` tokens at most (0: of all), and what is to be said of it."""
    from ztok_fast.codec.text import detokenize

    text, notices = data.decode("utf-8", "replace"), []
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        notices.append(
            f"bytes that are not UTF-8, from byte {error.start:,} on, are shown as \N{REPLACEMENT CHARACTER}"
        )
    tokens = codec.tokenize([text])[0]
    if most and len(tokens) > most:
        # The cut may fall inside a character, whose bytes are left out.
        text = detokenize(codec.tokenizer, tokens[:most]).decode("utf-8", "ignore").rstrip("\N{REPLACEMENT CHARACTER}")
        notices.append(
            f"the first {most:,} of {len(tokens):,} tokens are shown, and compressed alone (--tokens 0 shows all)"
        )
    return text, notices


# The page


def page_data(
    codec: ZTokCodec, name: str, codec_name: str, measurements: Sequence[Measurement], notices: Sequence[str]
) -> dict:
    """What the page holds, as JSON has it.

    Args:
        measurements: of one text, a ratio each.
    """
    first, slots = measurements[0], measurements[0].z.slot_offsets is not None
    return {
        "name": name,
        "codec": codec_name,
        "base": common.shown_name(codec.config.base_model or codec.base.name),
        "kind": "slots" if slots else "pooled",
        "segment": codec.config.segment_length,
        "notices": list(notices),
        "tokens": report.token_texts(codec.tokenizer, first.tokens),
        "bits": [round(bits, 1) for bits in first.surprisal.tolist()],
        "numbers": [list(row[:2]) for row in _numbers(codec, first)],
        "ratios": [_ratio_data(codec, m) for m in measurements],
    }


def _ratio_data(codec: ZTokCodec, m: Measurement) -> dict:
    texts = report.token_texts(codec.tokenizer, m.written)
    # A token inside a character adds no text of its own; what was written instead has to be seen.
    instead = {
        index: texts[index] or codec.tokenizer.decode([m.written[index]])
        for index, wrong in enumerate(m.wrong)
        if wrong
    }
    places = m.z.slot_offsets
    return {
        "ratio": m.z.documents[0].budget,
        "numbers": [row[2] for row in _numbers(codec, m)],
        "lengths": m.unit_lengths,
        "codes": _filled(m.z.codes),
        "places": None if places is None else _filled(places),
        "instead": instead,
    }


def _filled(values) -> list[list[int]]:
    return [[value for value in row if value >= 0] for row in values.tolist()]


def _numbers(codec: ZTokCodec, m: Measurement) -> list[tuple[str, str, str]]:
    """Rows of the table: name, explanation, value."""
    vocabulary = math.log2(codec.model.adapted.embedding.weight.shape[0])
    told = 1 - sum(m.guessed) / len(m.tokens) if m.z.slot_offsets is not None else None
    number, percent = report.number, report.percent
    return [
        ("Z-tokens", "how many the text takes", f"{m.z.ztokens:,}"),
        ("achieved ratio", "text tokens per Z-token", number(m.z.achieved_ratio)),
        ("plain rate", "bits per token of unit lengths and codes, each code at its full width", number(m.z.rate)),
        ("log2(vocabulary)", "bits of a token's number", number(vocabulary)),
        ("own bits H₀", "bits per token that the text has under the bare base model", number(m.base_bits)),
        ("residual bits", "bits per token that the Z-tokens leave open, H(x | z)", number(m.residual_bits)),
        (
            "efficiency η",
            "bits of the text saved by a bit of the Z-tokens, (H₀ − residual) / plain rate",
            number(m.efficiency),
        ),
        ("told", "share of the tokens that slots name; the others are guessed", percent(told)),
        ("free-running", "share of tokens right given what was written before", percent(m.free_running)),
        ("teacher-forced", "share of tokens right given the true text before", percent(m.teacher_forced)),
    ]


def render(data: dict) -> str:
    """The page: the template with the data as a block of JSON that no text can end."""
    template = TEMPLATE.read_text(encoding="utf-8")
    block = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        block = block.replace(character, f"\\u{ord(character):04x}")
    scripts = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    title = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in data["name"])
    parts = {
        "TITLE": html.escape(title),
        # The page runs its own script, and loads nothing.
        "POLICY": "default-src 'none'; style-src 'unsafe-inline'; script-src "
        + " ".join(f"'sha256-{own}'" for own in hashes),
        "DATA": block,
    }
    return re.sub(r"@@([A-Z]+)@@", lambda match: parts[match[1]], template)
