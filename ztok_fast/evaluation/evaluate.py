"""Evaluation of a codec that it cannot win without its language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from ztok_fast.codec.slot_model import SlotModel
from ztok_fast.evaluation import baselines, ways
from ztok_fast.evaluation.sample import Sample
from ztok_fast.evaluation.scores import Evaluation, Outcome, score

if TYPE_CHECKING:
    from ztok_fast.codec.codec import ZTokCodec
    from ztok_fast.codec.ztokens import ZTokens

CODEC, COMPRESSOR, DECOMPRESSOR = "codec", "without compressor", "without decompressor"
OPEN_LOOP, FIXED = "open loop", "fixed units"
IDS, TRUNCATION, CODED = "token ids", "truncation", "coded text"
WAYS = (CODEC, COMPRESSOR, DECOMPRESSOR, OPEN_LOOP, FIXED, IDS, TRUNCATION, CODED)
"""All ways to store texts that are compared. Those from the fourth on are baselines; see docs/evaluation.md."""

_BASELINES = {IDS: baselines.token_ids, TRUNCATION: baselines.truncation, CODED: baselines.coded_text}
_WITHOUT = {None: CODEC, "compressor": COMPRESSOR, "decompressor": DECOMPRESSOR}


def evaluate(codec: ZTokCodec, texts: Sequence[str], ratio: float = 4, *, without: str | None = None) -> Evaluation:
    """What a codec stores of texts and how much of them comes back.

    Example::

        codec = ztok_fast.ZTokCodec.from_pretrained("ztok-mini")
        print(ztok_fast.evaluate(codec, ["It was a bright cold day in April."], ratio=4).efficiency)

    Args:
        texts: documents; those without a token do not count.
        ratio: text tokens per Z-token to ask for.
        without: ``"compressor"``: without the compressor's language model. As many tokens are written as the codec
            writes, the rarest by the texts' own counts; of pooled units, latents come from word embeddings alone.
            ``"decompressor"``: without the decompressor's. What Z-tokens name comes back, and the commonest token
            elsewhere; of pooled units, what their copy path says.

    Raises:
        ValueError: no text has a token, a ratio that the codec cannot give, an unknown ``without``, or a codec whose
            Z-tokens say nothing without the decompressor.
    """
    if without not in _WITHOUT:
        raise ValueError(f"without: expected None, 'compressor' or 'decompressor', got {without!r}")
    ratio = codec.config.check_ratio(ratio)
    if without == "decompressor":
        ways.check_copy_path(codec)
    (found,) = compare(codec, Sample.of_texts(codec, texts), [ratio], [_WITHOUT[without]])
    return found


def ways_of(codec: ZTokCodec) -> tuple[str, ...]:
    """Those of `WAYS` that a codec has."""
    if isinstance(codec.model, SlotModel):
        return WAYS
    return tuple(w for w in WAYS if w != OPEN_LOOP and (w != DECOMPRESSOR or codec.config.copy_path))


def compare(
    codec: ZTokCodec,
    sample: Sample,
    ratios: Sequence[float],
    wanted: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Evaluation]:
    """The evaluations of ways to store a sample, at each ratio in turn.

    Args:
        wanted: some of `ways_of`; ``None`` for all of them.
        progress: called with the number of text tokens after every evaluation.
    """
    for ratio in ratios:
        z = ways.compressed(sample, ratio)
        for way in ways_of(codec) if wanted is None else wanted:
            yield score(sample, way, ratio, _outcome(codec, sample, ratio, way, z))
            if progress:
                progress(len(sample))


def _outcome(codec: ZTokCodec, sample: Sample, ratio: float, way: str, z: ZTokens) -> Outcome:
    if way == DECOMPRESSOR:
        return ways.without_decompressor(sample, z)
    if way in _BASELINES:
        bits, _ = ways.stored_bits(codec, z)
        return _BASELINES[way](sample, bits)
    if way == FIXED:
        z = ways.compressed(sample, ratio, fixed_units=True)
    elif way == OPEN_LOOP or (way == COMPRESSOR and isinstance(codec.model, SlotModel)):
        # A price of 0 would leave a token out where there is room.
        z = ways.dearest(sample, z, ways.rarity(sample) if way == COMPRESSOR else sample.own_bits + 1e-3)
    changed = way == COMPRESSOR and not isinstance(codec.model, SlotModel)
    with ways.without_compressor(codec) if changed else nullcontext():
        return ways.restored(sample, ways.compressed(sample, ratio) if changed else z)
