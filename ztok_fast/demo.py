"""The demo: a text that ships with the package, to Z-tokens and back (``python -m ztok_fast.demo``)."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ztok_fast.cli import common, report
from ztok_fast.cli.evaluation import SAMPLE

RATIOS = [2.0, 4.0, 8.0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ztok_fast.demo", description="Compress a text and get it back.")
    parser.add_argument("--text", metavar="FILE", default=str(SAMPLE), help="default: the text that ships")
    parser.add_argument(
        "-r", "--ratio", type=float, nargs="+", default=[2.0, 4.0, 8.0], metavar="R", help="default: 2 4 8"
    )
    common.add_codec_arguments(parser)
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    return common.run_plainly(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    data = common.read_bytes(options.text)
    text = data.decode("utf-8", "replace")
    from ztok_fast.cli.measure import measure

    started = time.perf_counter()
    codec = common.load_codec(options)
    load_seconds = time.perf_counter() - started
    measurements = [measure(codec, text, ratio) for ratio in options.ratio]
    exact = [codec.compress([data], ratio, exact=True) for ratio in options.ratio]
    whole = [codec.decompress_bytes(z)[0] == data for z in exact]
    vocabulary = math.log2(codec.model.adapted.embedding.num_embeddings)
    print(
        f"codec {options.codec}, loaded in {load_seconds:.1f} s; a text of {len(data):,} bytes = "
        f"{len(measurements[0].tokens):,} tokens of {report.number(vocabulary, 1)} bits each, on which\nthe base "
        f"model's own bits per token, without Z-tokens, are {report.number(measurements[0].base_bits)}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.ztok"
        stored = [_file_size(codec, m.z, path) for m in measurements]
        stored_exactly = [_file_size(codec, z, path) for z in exact]
    print(_numbers(measurements, stored, whole, stored_exactly))
    print("\n" + report.fold(f"The whole text stored exactly, in bytes: {_sizes(data)}", False, indent=""))
    colour = report.use_colour()
    for m in measurements:
        budget = f"{m.z.documents[0].budget:g}"
        texts = report.token_texts(codec.tokenizer, m.written)
        print(f"\nThe text as it came back at r = {budget}{'' if colour else ', wrong tokens in {braces}'}:\n")
        print(report.fold(report.mark_wrong(texts, m.wrong, colour), colour))
        texts = report.token_texts(codec.tokenizer, m.tokens)
        legend = "" if colour else ", | ends a unit"
        if m.z.slot_offsets is not None:
            texts = [f"[{text}]" if own and not colour else text for text, own in zip(texts, m.guessed)]
            legend += "" if colour else ", [guessed] by the decompressor, the rest written"
        print(f"\nWhere its {m.z.ztokens:,} Z-tokens went{legend}:\n")
        print(report.fold(report.mark_units(texts, m.unit_lengths, colour), colour))
    return 0 if all(whole) else 1


def _file_size(codec, z, path: Path) -> int:
    codec.save(z, path)
    return path.stat().st_size


def _numbers(measurements, stored, whole, stored_exactly) -> str:
    allocation = [m.surprisal_by_length() for m in measurements]
    rates = [8 * size / m.z.tokens for size, m in zip(stored, measurements)]
    saved = [m.base_bits - m.residual_bits for m in measurements]
    rows = [
        ["text tokens", *(f"{m.z.tokens:,}" for m in measurements)],
        ["Z-tokens", *(f"{m.z.ztokens:,}" for m in measurements)],
        ["achieved ratio", *(report.number(m.z.achieved_ratio) for m in measurements)],
        ["rate, bits per token: codes at full width", *(report.number(m.z.rate) for m in measurements)],
        ["rate, bits per token: all of the file", *(report.number(rate) for rate in rates)],
        ["residual bits, given Z-tokens and prefix", *(report.number(m.residual_bits) for m in measurements)],
        ["efficiency of the file (bits saved / spent)", *(report.number(s / r) for s, r in zip(saved, rates))],
        ["tokens right, free-running", *(report.percent(m.free_running) for m in measurements)],
        ["tokens right, teacher-forced", *(report.percent(m.teacher_forced) for m in measurements)],
        ["correlation of unit length and surprisal", *(report.number(value) for _, _, value in allocation)],
        ["seconds to compress", *(report.number(m.compress_seconds) for m in measurements)],
        ["seconds to decompress", *(report.number(m.decompress_seconds) for m in measurements)],
        ["exact mode: every byte came back", *("yes" if same else "NO" for same in whole)],
        ["the file, in bytes", *(f"{size:,}" for size in stored)],
        ["exact mode: the file, in bytes", *(f"{size:,}" for size in stored_exactly)],
    ]
    return report.table(["", *(f"r = {m.z.documents[0].budget:g}" for m in measurements)], rows)


def _sizes(data: bytes) -> str:
    """What exact storage takes: coded units, and the general compressors that are installed."""
    from ztok_fast.cli.profile_files import coded_files, general_compressors
    from ztok_fast.codec.coded import TextCoder

    with tempfile.TemporaryDirectory() as folder:
        ways = {"coded units": coded_files(TextCoder.from_pretrained(), Path(folder) / "x.ztok")}
        ways |= general_compressors()
        return ", ".join(f"{name} {len(compress(data)):,}" for name, (compress, _) in ways.items())


if __name__ == "__main__":
    raise SystemExit(main())
