"""The model card of a codec folder, from the results of `ztok eval`, the metrics of its training and its own words.

`bench/cards/<name>.md` has the words, between lines of dashes: what the codec is, how it was trained, its limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from bench.machine import ROOT, made_with
from bench.tables import number, percent, table
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.weights import codec_fingerprint, load_weights
from ztok_fast.evaluation.report import markdown

CARDS, RESULTS = ROOT / "bench" / "cards", ROOT / "docs" / "results"
HISTORY = 8
"""Most rows of a training table."""


class CardError(ValueError):
    """A file that a card is written from is missing, or is of another codec."""


class StaleResultsError(CardError):
    """The results are of other weights than the folder's, or of another form than `ztok eval` writes."""


Trained = tuple[str, str, Callable[[dict], dict[str, str]]]
PARTS: dict[str, Trained] = {
    "metrics.jsonl": (
        "decompressor",
        "Share of the tokens that an exact copy must write, and text tokens per Z-token then",
        lambda found: {"written": percent(found["written"]), "ratio": number(found["ratio"])},
    ),
    "compressor-metrics.jsonl": (
        "compressor",
        "Bits of a text token in the file at each ratio r, by the compressor's model of the slots",
        lambda found: {f"r = {ratio}": number(bits) for ratio, bits in found["symbol_bits"].items()},
    ),
    "inferencer-metrics.jsonl": (
        "inferencer",
        "Bits of the next Z-token, and those of as many slots drawn evenly",
        lambda found: {
            "bits per Z-token": number(found["bits_per_ztoken"]),
            "drawn evenly": number(found["uniform_bits"]),
        },
    ),
}
"""Metrics beside a card: the part that they are of, what its table shows, and the cells of an evaluation."""


def card(model: Path, results: Path | None = None, words: Path | None = None) -> str:
    """A codec's card.

    Args:
        model: the codec's folder. results, words: the results of `ztok eval` and the card's own words, by default those
            of the folder's name.

    Raises:
        CardError: a file is missing, or the results are of another codec; `StaleResultsError`: see there.
    """
    results, words = results or RESULTS / f"{model.name}.json", words or CARDS / f"{model.name}.md"
    needed = {"codec": model / "config.json", "results": results, "words": words, "metrics": model / "metrics.jsonl"}
    for what, path in needed.items():
        if not path.is_file():
            raise CardError(f"{what}: expected the file {path}, got none")
    found = json.loads(results.read_text(encoding="utf-8"))
    _check(found, results, model)
    own_words = words.read_text(encoding="utf-8").split("---\n")
    if len(own_words) != 3:
        raise CardError(f"{words}: expected 3 parts between lines of dashes, got {len(own_words)}")
    about, notes, limits = (part.strip() for part in own_words)
    files = [path for path in sorted(model.rglob("*")) if path.is_file() and not _beside(path)]
    sizes = [(path.relative_to(model).as_posix(), path.stat().st_size) for path in files]
    sizes.append(("all", sum(size for _, size in sizes)))
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    training = [_training(model / name, *part) for name, part in PARTS.items() if (model / name).is_file()]
    example = f'''```python
from ztok_fast import ZTokCodec

codec = ZTokCodec.from_pretrained("{model.name}")
z = codec.compress(["Some English text."], ratio=4)
print(codec.decompress(z))
```'''
    parts = [
        f"# {model.name}",
        about,
        "Its Z-tokens have slots, each with one token that the decompressor would not guess "
        "([docs/slots.md](../../../docs/slots.md)). Commands, data and licences: "
        "[docs/models.md](../../../docs/models.md).",
        "## Use",
        example,
        "## What it reaches",
        "Text that it has not seen. [Evaluation](../../../docs/evaluation.md) defines the columns and ways.",
        re.sub("^## ", "### ", markdown(found), flags=re.MULTILINE).strip(),
        made_with(found),
        "## Training",
        notes,
        *training,
        "From the metrics beside this card.",
        "## Limits",
        limits,
        "## Files",
        table(["file", "bytes"], [[name, f"{size:,}"] for name, size in sizes]),
        table(["setting", "value"], [[name, str(value)] for name, value in settings.items()]),
        "Licence: Apache-2.0. Training text: public domain and CC BY-SA ([docs/models.md](../../../docs/models.md)).",
    ]
    return "\n\n".join(parts) + "\n"


def _check(found: dict, path: Path, model: Path) -> None:
    """Refuse results that are not of this codec, of its weights, or without their command."""
    if "families" not in found:
        raise StaleResultsError(f"{path}: expected results of ztok eval, got a file without families")
    if found["codec"]["name"] != model.name:
        raise CardError(f"{path}: expected results of {model.name}, got those of {found['codec']['name']}")
    own, measured = codec_fingerprint(ZTokConfig.load(model), load_weights(model)), found["codec"]["fingerprint"]
    if own != measured:
        raise StaleResultsError(
            f"{path}: expected results of the codec {own[:16]}..., got those of {measured[:16]}...: run ztok eval again"
        )
    if "environment" not in found:
        raise StaleResultsError(f"{path}: expected the command and the machine under 'environment', got neither")


def _beside(path: Path) -> bool:
    """Whether a file of the folder is not part of the codec: the card itself, and metrics."""
    return path.name == "README.md" or path.name.endswith("metrics.jsonl")


def _training(path: Path, part: str, shown: str, cells: Callable[[dict], dict[str, str]]) -> str:
    """The evaluations during one training, thinned to a few that end with the last.

    Raises:
        CardError: no step, or evaluations of another kind.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not rows:
        raise CardError(f"{path}: expected at least one step, got none")
    head = f"The {part}: {rows[-1]['step']:,} steps."
    evaluated = [row for row in rows if row.get("eval")]
    if not evaluated:
        return f"{head} The run ended before its first evaluation."
    thinned = evaluated[::-1][:: -(-len(evaluated) // HISTORY)][::-1]
    try:
        columns = [{"step": f"{row['step']:,}", **cells(row["eval"])} for row in thinned]
    except KeyError as error:
        raise CardError(f"{path}: expected evaluations of a {part} of slots, got one without {error}") from error
    return f"{head} {shown}:\n\n{table(list(columns[0]), [list(row.values()) for row in columns])}"
