"""``ztok info``: describe a ``.ztok`` file, a codec, or the units of a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ztok_fast.cli import common, report

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec
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
    z = common.load_batch(options.target, options)
    size = Path(options.target).stat().st_size
    originals = [document.byte_length for document in z.documents if document.byte_length is not None]
    rows: list[tuple[str, object]] = [
        ("documents", f"{len(z):,}"),
        ("text tokens", f"{z.tokens:,}"),
        ("Z-tokens", f"{z.ztokens:,} of up to {z.num_codebooks} codes from {z.codebook_size:,}"),
        ("achieved ratio", f"{report.number(z.achieved_ratio)} text tokens per Z-token"),
        ("rate", f"{report.number(z.rate)} bits per text token"),
    ]
    if any(document.corrections is not None for document in z.documents):
        rows.append(("exact", f"{report.number(z.rate_exact)} bits per text token"))
    if len(originals) == len(z):
        rows.append(("original", f"{sum(originals):,} bytes"))
    rows += [
        ("this file", f"{size:,} bytes"),
        ("unit lengths", report.length_histogram(z.unit_lengths.tolist())),
        ("codec", z.codec_fingerprint),
    ]
    print(report.pairs(rows))
    if len(z):
        print()
        print(report.table(_DOCUMENT_COLUMNS, [_document_row(index, one) for index, one in enumerate(z)]))
    if options.units:
        codec = common.load_codec(options)
        for index, tokens in enumerate(codec.decompress_tokens(z)):
            print(f"\ndocument {index}:")
            corrections = z.documents[index].corrections
            if corrections is not None and corrections.raw is not None:
                print("  stored as it is, since that is smaller than what exact mode adds")
            else:
                _show_units(codec, tokens, z[index].unit_lengths.tolist(), options.tokens)
    return 0


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
                ("unit lengths", report.length_histogram(z.unit_lengths.tolist())),
            ]
        )
    )
    print()
    _show_units(codec, tokens, z.unit_lengths.tolist(), options.tokens)
    return 0


def _show_units(codec: ZTokCodec, tokens: list[int], unit_lengths: list[int], most: int) -> None:
    shown, covered = 0, 0
    for length in unit_lengths:
        if most and covered + length > most:
            break
        shown, covered = shown + 1, covered + length
    colour = report.use_colour()
    texts = report.token_texts(codec.tokenizer, tokens[:covered])
    print(report.fold(report.mark_units(texts, unit_lengths[:shown], colour), colour))
    if covered < len(tokens):
        print(f"  ... and {len(tokens) - covered:,} more tokens (--tokens 0 shows all)")
