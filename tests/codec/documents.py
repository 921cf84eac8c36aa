"""Compressed documents for the tests: hand-made ones and a Hypothesis strategy."""

import hashlib

import torch
from hypothesis import strategies as st

from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.documents import DocumentInfo, digest_of
from ztok_fast.codec.exact_patch import Patch
from ztok_fast.codec.zbatch import ZBatch

FINGERPRINT = hashlib.sha256(b"the codec of the tests").hexdigest()


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_batch(documents, *, num_codebooks=2, codebook_size=16, max_unit_length=8, fingerprint=FINGERPRINT) -> ZBatch:
    """A batch of (segments, info) pairs; a segment is a list of (unit length, codes of the levels used)."""
    codes, lengths, cu_segments, cu_documents = [], [], [0], [0]
    for segments, info in documents:
        for segment in segments:
            for length, used in segment:
                lengths.append(length)
                codes.append([*used, *[-1] * (num_codebooks - info.levels)])
            cu_segments.append(len(codes))
        cu_documents.append(len(cu_segments) - 1)
    return ZBatch(
        codes=int32(codes).reshape(len(codes), num_codebooks),
        unit_lengths=int32(lengths),
        cu_segments=int32(cu_segments),
        cu_documents=int32(cu_documents),
        documents=[info for _, info in documents],
        codec_fingerprint=fingerprint,
        codebook_size=codebook_size,
        max_unit_length=max_unit_length,
    )


def example() -> ZBatch:
    """Four documents: plain with a segment without Z-tokens, empty, one level with corrections, raw."""
    original = b"seven tokens, of which two were wrong"
    corrections = Corrections(int32([1, 6]), int32([40_000, 3]), Patch(2, 4, b"\xff\x00\xfe"))
    raw = b"aaaaaaaaaaaaaaaaaaaaaaaa"
    return make_batch(
        [
            ([[(3, (1, 15)), (1, (0, 2))], [], [(8, (7, 7))]], DocumentInfo(12, 4.0, 2)),
            ([], DocumentInfo(0, 2.0, 2, digest_of(b"").hex(), 0, Corrections.none_needed())),
            (
                [[(4, (9,)), (3, (0,))]],
                DocumentInfo(7, 3.5, 1, digest_of(original).hex(), len(original), corrections),
            ),
            (
                [[(2, (5, 6))]],
                DocumentInfo(2, 2.0, 2, digest_of(raw).hex(), len(raw), Corrections.stored_raw(raw)),
            ),
        ]
    )


@st.composite
def documents_info(draw, tokens: int, num_codebooks: int):
    levels = draw(st.integers(1, num_codebooks))
    budget = draw(st.integers(100, 6400)) / 100
    if draw(st.booleans()):
        return DocumentInfo(tokens, budget, levels)
    original = draw(st.binary(max_size=40))
    corrections = draw(st.none() | corrections_for(tokens, original))
    digest = None if corrections is None else digest_of(original).hex()
    return DocumentInfo(tokens, budget, levels, digest, len(original), corrections)


@st.composite
def corrections_for(draw, tokens: int, original: bytes):
    if draw(st.booleans()):
        return Corrections.stored_raw(original)
    places = sorted(draw(st.sets(st.integers(0, tokens - 1)))) if tokens else []
    true = [draw(st.integers(0, 2**31 - 1)) for _ in places]
    patch = draw(st.none() | st.tuples(st.integers(0, 50), st.integers(0, 50), st.binary(max_size=20)))
    own = Corrections(int32(places), int32(true))
    if draw(st.booleans()):
        own = Corrections.of_remainder(draw(st.binary(max_size=300)))
    own.patch = None if patch is None else Patch(patch[0], patch[0] + patch[1], patch[2][: len(original)])
    return own


@st.composite
def batches(draw, max_documents: int = 4):
    """Valid batches of any shape: no documents, empty documents and segments, dropped levels, every correction."""
    num_codebooks = draw(st.integers(1, 4))
    codebook_size = draw(st.sampled_from([2, 3, 16, 1000, 65536]))
    max_unit_length = draw(st.sampled_from([1, 2, 7, 300]))
    documents = []
    for _ in range(draw(st.integers(0, max_documents))):
        rows_per_segment = draw(st.lists(st.integers(0, 3), max_size=3))
        lengths = [[draw(st.integers(1, max_unit_length)) for _ in range(rows)] for rows in rows_per_segment]
        info = draw(documents_info(sum(map(sum, lengths)), num_codebooks))
        code = st.integers(0, codebook_size - 1)
        segments = [[(length, [draw(code) for _ in range(info.levels)]) for length in segment] for segment in lengths]
        documents.append((segments, info))
    return make_batch(
        documents, num_codebooks=num_codebooks, codebook_size=codebook_size, max_unit_length=max_unit_length
    )
