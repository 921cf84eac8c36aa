"""``ztok info``: describe a ``.ztok`` file, a codec, or the units of a text."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ztok_fast.cli import common, report

if TYPE_CHECKING:
    from ztok_fast.codec.documents import DocumentInfo
    from ztok_fast.codec.zbatch import ZBatch


def add_commands(commands) -> None:
    parser = commands.add_parser(
        "info",
        help="describe a .ztok file, a codec, or the units of a text",
        description="Describe a .ztok file or a codec. Or compress a text and show its units, the tokens that each "
        "Z-token stands for: in colour on a terminal, otherwise with a | after every unit.",
    )
    parser.add_argument("target", metavar="FILE.ztok|FILE|CODEC", help="- reads a text from stdin")
    parser.add_argument("-r", "--ratio", type=float, default=4.0, help="for a text: tokens per Z-token (default: 4)")
    parser.add_argument("--units", action="store_true", help="for a .ztok file: also decompress it and show its units")
    parser.add_argument(
        "--tokens",
        type=int,
        default=600,
        metavar="N",
        help="maximum number of tokens to show (default: 600; 0 for all)",
    )
    common.add_codec_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    target = Path(options.target)
    if options.tokens < 0:
        raise common.UsageError(f"--tokens: expected 0 or more, got {options.tokens}")
    if target.suffix == ".ztok":
        return _describe_file(options)
    if options.target != "-" and (target.is_dir() or not target.exists()):
        return _describe_codec(options.target, options.base)
    return _describe_text(options)


def _describe_file(options: argparse.Namespace) -> int:
    path = common.check_batch_name(options.target)
    if common.form_name(options.target) == "coded":
        from ztok_fast.cli import coded

        return coded.describe(options)
    from ztok_fast.codec.learned_file import Reading, read_units

    codec = common.load_codec(options)
    totals = _Totals()
    rows: list[list[str]] = []
    shown: list[ZBatch] = []
    for block, goes_on in read_units(path, Reading.of(codec)):
        totals.add(block, goes_on)
        for one in block if len(rows) < MOST_ROWS else ():
            rows.append(_document_row(len(rows), one))
            if options.units:
                shown.append(one)
    print(report.pairs(totals.lines(path.stat().st_size)))
    if rows:
        print()
        print(report.table(_DOCUMENT_COLUMNS, rows[:MOST_ROWS]))
    if totals.parts > MOST_ROWS:
        print(f"... and {totals.parts - MOST_ROWS:,} more")
    for index, one in enumerate(shown):
        corrections = one.documents[0].corrections
        print(f"\ndocument {index}:")
        if corrections is not None and corrections.raw is not None:
            print("  stored as it is, since that is smaller than what exact mode adds")
        else:
            report.show_units(
                codec.tokenizer, codec.decompress_tokens(one)[0], one.unit_lengths.tolist(), options.tokens
            )
    return 0


MOST_ROWS = 1000
"""Documents that get a line of their own; a file may have millions."""


class _Totals:
    """What the blocks of a file hold together."""

    def __init__(self) -> None:
        self.parts = self.documents = self.tokens = self.ztokens = self.originals = 0
        self.bits = self.bits_exact = 0.0
        self.is_exact, self.is_original, self.lengths = False, True, Counter[int]()

    def add(self, block: ZBatch, goes_on: list[bool]) -> None:
        self.parts, self.documents = self.parts + len(block), self.documents + goes_on.count(False)
        self.tokens, self.ztokens = self.tokens + block.tokens, self.ztokens + block.ztokens
        if block.tokens:
            self.bits += block.rate * block.tokens
            self.bits_exact += block.rate_exact * block.tokens
        for own in block.documents:
            self.is_exact |= own.corrections is not None
            self.is_original &= own.byte_length is not None
            self.originals += own.byte_length or 0
        self.lengths.update(block.unit_lengths.tolist())
        self.last = block

    def lines(self, size: int) -> list[tuple[str, object]]:
        own, tokens = self.last, self.tokens
        ratio = tokens / self.ztokens if self.ztokens else None
        rows: list[tuple[str, object]] = [
            ("documents", f"{self.documents:,}"),
            ("text tokens", f"{tokens:,}"),
            ("Z-tokens", f"{self.ztokens:,} of up to {own.num_codebooks} codes from {own.codebook_size:,}"),
            ("achieved ratio", f"{report.number(ratio)} text tokens per Z-token"),
            ("rate", f"{report.number(self.bits / tokens if tokens else None)} bits per text token"),
        ]
        if self.is_exact:
            rows.append(("exact", f"{report.number(self.bits_exact / tokens if tokens else None)} bits per text token"))
        if self.is_original:
            rows.append(("original", f"{self.originals:,} bytes"))
        return [
            *rows,
            ("this file", f"{size:,} bytes"),
            ("unit lengths", report.length_histogram(self.lengths)),
            ("codec", own.codec_fingerprint),
        ]


_DOCUMENT_COLUMNS = ("document", "tokens", "Z-tokens", "budget", "ratio", "levels", "rate", "bytes", "exact")


def _document_row(index: int, one: ZBatch) -> list[str]:
    info = one.documents[0]
    return [
        str(index),
        f"{info.tokens:,}",
        f"{one.ztokens:,}",
        f"{info.budget:g}",
        report.number(one.achieved_ratio),
        str(info.levels),
        report.number(one.rate),
        "-" if info.byte_length is None else f"{info.byte_length:,}",
        _exactness(info),
    ]


def _exactness(info: DocumentInfo) -> str:
    if info.corrections is None:
        return "no"
    if info.corrections.raw is not None:
        return "stored as it is"
    patch = "" if info.corrections.patch is None else " and a patch"
    if info.corrections.remainder is not None:
        return f"{len(info.corrections.remainder):,} bytes{patch}"
    return f"{len(info.corrections.positions):,} corrections{patch}"


def _describe_codec(name: str, base_name: str | None) -> int:
    from ztok_fast.codec.codec import ZTokCodec
    from ztok_fast.codec.shipped import codec_folder, shipped_codecs

    folder = codec_folder(name)
    if not folder.is_dir():
        raise common.UsageError(
            f"{name}: there is no such file, codec folder or shipped codec; shipped are {shipped_codecs()}"
        )
    codec = ZTokCodec.from_pretrained(name, base=base_name)
    config, state = codec.config, codec.model.codec_state()
    own = sum(parameter.numel() for parameter in state.values())
    adapters = sum(parameter.numel() for key, parameter in state.items() if key.startswith("adapters."))
    base = sum(parameter.numel() for parameter in codec.base.model.parameters()) - adapters
    rows: list[tuple[str, object]] = [
        ("folder", folder),
        ("size", f"{sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) / 1e6:.1f} MB with all it holds"),
        ("base model", f"{codec.base.name} ({base / 1e6:,.1f} M parameters)"),
        ("base fingerprint", codec.base.fingerprint),
        ("codec fingerprint", codec.fingerprint),
        ("own parameters", f"{own / 1e6:,.2f} M"),
        ("bits per Z-token", report.number(config.bits_per_ztoken)),
    ]
    shown = {"base_model", "base_fingerprint", "format_version"}
    rows += [(key, value) for key, value in config.to_dict().items() if key not in shown]
    print(report.pairs(rows))
    return 0


def _describe_text(options: argparse.Namespace) -> int:
    data = common.read_bytes(options.target)
    codec = common.load_codec(options)
    text = data.decode("utf-8", "replace")
    tokens = common.tokenize(codec, [text])[0]
    with common.progress_bar(len(tokens), "compress") as progress:
        z = codec.compress([data], options.ratio, progress=progress)
    print(
        report.pairs(
            [
                ("text tokens", f"{z.tokens:,}"),
                ("Z-tokens", f"{z.ztokens:,}"),
                ("achieved ratio", f"{report.number(z.achieved_ratio)} text tokens per Z-token"),
                ("rate", f"{report.number(z.rate)} bits per text token"),
                ("unit lengths", report.length_histogram(Counter(z.unit_lengths.tolist()))),
            ]
        )
    )
    print()
    report.show_units(codec.tokenizer, tokens, z.unit_lengths.tolist(), options.tokens)
    return 0
