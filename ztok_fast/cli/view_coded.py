"""The page of ``ztok view`` for a document of a file of coded units."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ztok_fast.cli import common, report

if TYPE_CHECKING:
    from ztok_fast.codec.coded_units import CodedUnits, UnitCoder


def page_data(options: argparse.Namespace) -> dict:
    """What the page of a file's first document, or of that which ``--document`` names, holds."""
    from ztok_fast.codec.coded_file import CodedFile, coder_for
    from ztok_fast.codec.coded_units import unit_coder_of
    from ztok_fast.codec.text import detokenize

    coder, aligned = unit_coder_of(options.file, coder_for(options.file, *common.base_of(options)))
    with CodedFile(options.file, coder.coder) as file:
        wanted = options.document or 0
        if not 0 <= wanted < len(file):
            raise common.UsageError(f"--document: expected 0 to {len(file) - 1}, got {wanted}")
        text = file[wanted]
    (tokens,) = coder.coder.tokens([text])
    if not tokens:
        raise common.UsageError(
            f"{options.file}, document {wanted}: expected text that tokens can represent, got other"
        )
    notices = []
    if options.tokens and len(tokens) > options.tokens:
        notices.append(
            f"the first {options.tokens:,} of {len(tokens):,} tokens are shown, and coded alone (--tokens 0 shows all)"
        )
        cut = detokenize(coder.coder.base.tokenizer, tokens[: options.tokens])
        text = cut.decode("utf-8", "ignore").rstrip("\N{REPLACEMENT CHARACTER}").encode()
        (tokens,) = coder.coder.tokens([text])
    units = coder.compress([text], aligned)
    return {
        "name": common.shown_name(options.file),
        "codec": f"of coded units, {'aligned' if aligned else 'a stream'},",
        "base": coder.coder.base.name,
        "kind": "coded",
        "segment": coder.coder.context,
        "notices": notices,
        "tokens": report.token_texts(coder.coder.base.tokenizer, tokens),
        **_numbers(coder, tokens, units),
    }


def _numbers(coder: UnitCoder, tokens: list[int], units: CodedUnits) -> dict:
    context = coder.coder.context
    _, bits = coder.coder.streams([tokens[i : i + context] for i in range(0, len(tokens), context)])
    own = bits.mean().item()
    rows = [
        ("Z-tokens", "how many the text takes", f"{units.ztokens:,}"),
        ("achieved ratio", "text tokens per Z-token", report.number(units.achieved_ratio)),
        ("rate", "bits per token of the Z-tokens, which give the text exactly", report.number(units.rate)),
        ("own bits H₀", "bits per token that the text has under the base model", report.number(own)),
        ("rate / H₀", "what the Z-tokens take of that", report.number(units.rate / own if own else None)),
    ]
    ratio = {
        "ratio": round(units.achieved_ratio, 2),
        "numbers": [value for _, _, value in rows],
        "lengths": units.unit_lengths.tolist(),
        "codes": units.codes.tolist(),
        "places": None,
        "instead": {},
    }
    return {
        "bits": [round(value, 1) for value in bits.tolist()],
        "numbers": [[name, words] for name, words, _ in rows],
        "ratios": [ratio],
    }
