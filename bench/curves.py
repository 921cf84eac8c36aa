"""Accuracy of a codec against its rate, and where its Z-tokens go: a JSON file and a figure.

Every point is one budget, one number of residual levels, learned or fixed units. Needs matplotlib for the figure alone.

    python -m bench.curves --codec ztok-mini --files data/dev.jsonl.gz \\
        --json docs/results/ztok-mini.json --figure docs/figures/ztok-mini.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench import results as files
from bench.machine import environment
from bench.plots import new_figure
from bench.tables import evaluation_cells, number, percent, table
from ztok_fast.codec.codec import DEFAULT_CODEC, ZTokCodec
from ztok_fast.codec.layout import offsets, sequence_of_row, split_segments
from ztok_fast.codec.passes import emit_documents
from ztok_fast.train.evaluate import UNIT_KINDS, dev_documents, evaluate, unit_kinds
from ztok_fast.train.text_data import DataError


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.curves", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--codec", default=DEFAULT_CODEC, help=f"codec folder or shipped name (default {DEFAULT_CODEC})")
    add("--files", nargs="+", required=True, metavar="FILE", help="JSON lines (.gz) with a text field")
    add("--exclude-sources", nargs="*", default=[], metavar="PREFIX", help="rows to leave out, by source")
    add("--budgets", nargs="+", type=float, help="ratios to ask for (default: those of the codec)")
    add("--levels", nargs="+", type=int, help="residual levels (default: 1 to the codec's number)")
    add("--units", nargs="+", choices=tuple(UNIT_KINDS), help="kinds of units (default: the codec's own)")
    add("--documents", type=int, default=32, help="documents, spread over the files (default 32)")
    add("--tokens", type=int, default=512, help="tokens of each document (default 512)")
    add("--json", required=True, metavar="FILE", help="results")
    add("--figure", metavar="FILE", help="PNG or SVG; needs matplotlib")
    options = parser.parse_args(argv)
    for name in ("documents", "tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.figure:
        try:
            import matplotlib  # noqa: F401  before the hour of measuring, not after it
        except ImportError:
            parser.error("--figure: needs the package matplotlib: pip install matplotlib")
    try:
        codec = ZTokCodec.from_pretrained(options.codec)
        results = measure(codec, options)
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results = {"environment": environment("bench.curves", argv), **results}
    files.save(results, options.json)
    print(accuracy_table(results), length_table(results), sep="\n\n")
    if options.figure:
        draw(results, Path(options.figure))
    return 0


def measure(codec: ZTokCodec, options: argparse.Namespace) -> dict:
    """All points and the unit lengths, as they stand in the results file.

    Raises:
        ValueError: no document, or a budget or number of levels that the codec does not have.
    """
    config = codec.config
    budgets = [config.check_ratio(b) for b in options.budgets or config.budgets]
    # Slots cannot be left out as residual levels can.
    lowest = config.num_codebooks if config.emission == "slots" else 1
    levels = options.levels or list(range(lowest, config.num_codebooks + 1))
    for level in levels:
        if not lowest <= level <= config.num_codebooks:
            raise ValueError(f"levels: expected {lowest} to {config.num_codebooks}, got {level}")
    limit = config.section_tokens
    documents = dev_documents(
        options.files, codec.tokenizer, options.documents, min(options.tokens, limit), options.exclude_sources
    )
    if not documents:
        raise ValueError(f"files: expected at least one text outside the excluded sources in {options.files}, got none")
    points, base = [], None
    for units in options.units or unit_kinds(config):
        for level in levels:
            print(f"{units} units, {level} of {config.num_codebooks} levels ...", file=sys.stderr, flush=True)
            report = evaluate(codec, documents, budgets, fixed_units=UNIT_KINDS[units], levels=level)
            base = report.pop("base")
            points += [{"units": units, "levels": level, "budget": float(b), **values} for b, values in report.items()]
    own = ("base_model", "num_codebooks", "codebook_size", "segment_length")
    named = {"name": Path(options.codec).name, "fingerprint": codec.fingerprint}
    data = {"files": list(options.files), "exclude_sources": list(options.exclude_sources)}
    return {
        "codec": {**named, **{name: getattr(config, name) for name in own}},
        "data": {**data, "documents": len(documents), "tokens": sum(map(len, documents))},
        "base": base,
        "points": points,
        "unit_lengths": {f"{budget:g}": surprisal_by_length(codec, documents, budget) for budget in budgets},
    }


@torch.inference_mode()
def surprisal_by_length(codec: ZTokCodec, documents: list[list[int]], budget: float) -> list[dict]:
    """Mean surprisal of the tokens in learned units of each length.

    Returns:
        One row per length that occurs, shortest first: ``length`` in tokens, ``units`` of that length, and
        ``bits_per_token``, the mean surprisal of their tokens under the bare base model given their segment.
    """
    model = codec.model
    bits_of: dict[int, float] = {}
    units_of: dict[int, int] = {}
    for document in documents:
        z = emit_documents(model, [document], budget, fixed_units=False)
        segments, _ = split_segments([len(document)], model.config.segment_length)
        device = model.device
        tokens = torch.tensor(document, dtype=torch.int64, device=device)
        bits = model.surprisal(tokens, offsets(torch.tensor(segments, device=device)))
        of_unit = sequence_of_row(offsets(z.unit_lengths), len(document))
        sums = torch.zeros(z.ztokens, device=device).index_add_(0, of_unit, bits)
        for length, total in zip(z.unit_lengths.tolist(), sums.tolist()):
            units_of[length] = units_of.get(length, 0) + 1
            bits_of[length] = bits_of.get(length, 0.0) + total
    return [
        {"length": n, "units": units_of[n], "bits_per_token": bits_of[n] / (n * units_of[n])} for n in sorted(units_of)
    ]


def accuracy_table(results: dict) -> str:
    """One row per point; the base model's own bits and accuracy stand under it."""
    rows = []
    for p in results["points"]:
        *accuracies, ratio, rate = evaluation_cells(p)
        rows.append([p["units"], p["levels"], f"{p['budget']:g}", ratio, rate, *accuracies, number(p["loss_bits"])])
    headers = ["units", "levels", "budget", "ratio", "rate, bits/token", "teacher-forced", "free-running"]
    base = results["base"]
    return (
        f"{table([*headers, 'loss, bits/token'], rows)}\n\nThe same base model without Z-tokens, on the same segments: "
        f"{number(base['bits_per_token'])} bits per token (the bound on an exact rate), {percent(base['accuracy'])} of "
        "the tokens guessed given the true prefix."
    )


def length_table(results: dict) -> str:
    """Mean surprisal by unit length, for every budget."""
    rows = [
        [budget, row["length"], row["units"], number(row["bits_per_token"])]
        for budget, own in results["unit_lengths"].items()
        for row in own
    ]
    return table(["budget", "unit length, tokens", "units", "surprisal, bits/token"], rows)


def draw(results: dict, path: Path) -> None:
    """Left: accuracy against rate. Right: surprisal against unit length."""
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    budgets = sorted({point["budget"] for point in results["points"]})
    kinds = (("free_running", "free-running", "o", 1.0), ("teacher_forced", "teacher-forced", "^", 0.4))
    for units, line in (("written", "--"), ("learned", "-"), ("fixed", ":")):
        for i, budget in enumerate(budgets):
            own = [p for p in results["points"] if (p["units"], p["budget"]) == (units, budget)]
            own.sort(key=lambda p: p["rate"])
            for name, text, marker, alpha in kinds if own else ():
                rates, shares = [p["rate"] for p in own], [p[name] for p in own]
                style = {"color": f"C{i}", "marker": marker, "markersize": 4, "alpha": alpha}
                left.plot(rates, shares, line, label=f"r = {budget:g}, {units} units, {text}", **style)
    base = results["base"]
    left.axvline(base["bits_per_token"], color="black", linewidth=0.8, label="text's own bits per token (base model)")
    left.axhline(base["accuracy"], color="grey", linewidth=0.8, linestyle="--", label="base model without Z-tokens")
    left.set(xlabel="rate, bits per text token", ylabel="share of tokens right", ylim=(0, 1.02))
    left.set_xlim(left=0)
    left.legend(fontsize=6)
    for i, (budget, own) in enumerate(results["unit_lengths"].items()):
        lengths, bits = [r["length"] for r in own], [r["bits_per_token"] for r in own]
        right.plot(lengths, bits, color=f"C{i}", marker="o", markersize=4, label=f"r = {budget}")
    right.axhline(base["bits_per_token"], color="black", linewidth=0.8, label="mean of all tokens")
    right.set(xlabel="unit length, text tokens", ylabel="mean surprisal of its tokens, bits")
    right.legend(fontsize=7)
    figure.suptitle(f"{results['codec']['name']}: {results['data']['tokens']:,} text tokens", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None} if path.suffix == ".png" else None)


if __name__ == "__main__":
    raise SystemExit(main())
