"""Random documents of learned units for the tests of their files, which need no model."""

import random

import torch

from tests.codec.documents import FINGERPRINT, int32, make_batch
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.documents import DocumentInfo, digest_of
from ztok_fast.codec.errors import ZFileError
from ztok_fast.codec.exact_patch import Patch
from ztok_fast.codec.learned_file import Reading, load_units
from ztok_fast.codec.learned_writer import save_units
from ztok_fast.codec.zbatch import ZBatch

SEGMENT = 12
POOLED = ZTokConfig(segment_length=SEGMENT, num_codebooks=3, codebook_size=100, max_unit_length=8)
SLOTS = ZTokConfig(
    segment_length=SEGMENT, num_codebooks=3, codebook_size=100, max_unit_length=SEGMENT, emission="slots"
)
VOCABULARY = 1000


def units_of(draw: random.Random, tokens: int, longest: int) -> list[int]:
    units = []
    while tokens:
        units.append(draw.randint(1, min(longest, tokens)))
        tokens -= units[-1]
    return units


def corrections_of(draw: random.Random, tokens: int, original: bytes) -> Corrections:
    kind = draw.randrange(4)
    if kind == 0:
        return Corrections.stored_raw(original)
    if kind == 1:
        places = sorted(draw.sample(range(tokens), draw.randint(0, tokens)))
        own = Corrections(int32(places), int32([draw.randrange(VOCABULARY) for _ in places]))
    else:
        own = Corrections.of_remainder(draw.randbytes(draw.choice((0, 1, 5, 300))))
    if draw.random() < 0.3:
        start = draw.randrange(9)
        own.patch = Patch(start, start + draw.randrange(5), original[: draw.randrange(9)])
    return own


def random_document(draw: random.Random, config: ZTokConfig):
    """Segments as `make_batch` takes them, and what is known of the document."""
    generated = draw.random() < 0.3
    tokens = draw.choice((0, 1, SEGMENT, draw.randrange(1, 70)))
    segments, left = [], tokens
    while left:
        own = min(left, draw.randint(1, SEGMENT) if generated else SEGMENT)
        segments.append(units_of(draw, own, config.max_unit_length))
        left -= own
    levels = config.num_codebooks if config.emission == "slots" else draw.randint(1, config.num_codebooks)
    codes = [[(n, [draw.randrange(config.codebook_size) for _ in range(levels)]) for n in own] for own in segments]
    budget = draw.randint(100, 1600) / 100
    if generated:
        return codes, DocumentInfo(tokens, budget, levels)
    original = draw.randbytes(draw.choice((0, 1, 20, 300)))
    if draw.random() < 0.3:
        return codes, DocumentInfo(tokens, budget, levels, None, len(original))
    own = corrections_of(draw, tokens, original)
    return codes, DocumentInfo(tokens, budget, levels, digest_of(original).hex(), len(original), own)


def random_batch(draw: random.Random, config: ZTokConfig, documents: int) -> ZBatch:
    z = make_batch(
        [random_document(draw, config) for _ in range(documents)],
        num_codebooks=config.num_codebooks,
        codebook_size=config.codebook_size,
        max_unit_length=config.max_unit_length,
    )
    z.precision = "int8"
    if config.emission == "slots":
        z.slot_offsets = torch.full_like(z.codes, -1)
        for row, length in enumerate(z.unit_lengths.tolist()):
            places = sorted(draw.sample(range(length), draw.randint(0, min(config.num_codebooks, length))))
            z.codes[row, len(places) :] = -1
            z.slot_offsets[row, : len(places)] = int32(places)
    return z.validate()


def no_prior(*_):
    """These codecs have no model; a kind that was altered may ask for one."""
    raise ZFileError("expected no stream under a model")


def save(z: ZBatch, path, config: ZTokConfig, prior=None) -> bytes:
    save_units(z, path, config, prior)
    return path.read_bytes()


def load(path, config: ZTokConfig, read_prior=no_prior) -> ZBatch:
    return load_units(path, Reading(config, FINGERPRINT, VOCABULARY, read_prior))
