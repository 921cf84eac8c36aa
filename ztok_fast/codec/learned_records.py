"""Documents of learned units as records of a file (`ztok_fast.codec.learned_file`).

docs/file-format.md lays out the bytes. A document's kind says how its Z-tokens are coded and what exact mode stores;
every count is checked against the bytes that are there before memory is taken for it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ztok_fast.codec.bitpack import MAX_BITS, pack_codes, packed_size, unpack_codes
from ztok_fast.codec.config import ZTokConfig
from ztok_fast.codec.corrections import Corrections, bit_width
from ztok_fast.codec.documents import DocumentInfo
from ztok_fast.codec.errors import ZBatchError, ZFileError
from ztok_fast.codec.exact_patch import Patch
from ztok_fast.codec.layout import offsets, split_segments
from ztok_fast.codec.slot_coding import decode_slots, encode_slots
from ztok_fast.codec.varint import join_parts, read_varint, split_parts, varint
from ztok_fast.codec.zbatch import ZBatch
from ztok_fast.codec.ztokens import ZTokens

PACKED, ADAPTIVE, PRIOR = 1, 2, 3
"""How Z-tokens are coded: in bits, by tables of counts that learn (`slot_coding`), under a model (`slot_prior`)."""

GENERATED, LOSSY, GUESSED, REMAINDER, CORRECTED, AS_IT_IS = range(6)
"""What is known of a document's text: there was none; nothing; the guesses are right; or what exact mode stores."""

MOST_ZTOKENS_OF_A_BYTE, MOST_TOKENS_OF_A_BYTE = 1 << 12, 512
"""What damaged streams can ask for: of Z-tokens coded adaptively, and of text tokens under a model. Z-tokens that take
less than that under the model are coded adaptively."""

LARGEST_COUNT = (1 << 31) - 1
_HUNDREDTHS = 100


@dataclass
class Stored:
    """A document as its record has it, but for the Z-tokens, whose stream is not read yet."""

    info: DocumentInfo
    coding: int
    stream: bytes
    ztokens: int = 0
    rows: list[int] | None = None


def bits_for(size: int) -> int:
    """Bits of one of ``size`` different values, at least 1."""
    return max(1, (size - 1).bit_length())


def is_exact(kind: int) -> bool:
    """Whether the original comes back, so that the record has its hash."""
    return kind >> 1 & 7 >= GUESSED


def write_document(one: ZBatch, config: ZTokConfig, prior: bytes | None) -> tuple[int, bytes]:
    """The kind and the bytes of a document's record; ``prior`` is its stream of `slot_prior`, if there is one.

    Raises:
        ZBatchError: a document that was compressed is not cut into segments as the codec cuts.
    """
    info = one.documents[0]
    head = varint(info.tokens) + varint(round(info.budget * _HUNDREDTHS))
    state, parts, patch = _exactness(info)
    if one.slot_offsets is None:
        coding, stream = PACKED, _pack(one, config)
        head += varint(info.levels) + varint(one.ztokens)
    else:
        coding, stream = ADAPTIVE, encode_slots(one, config.codebook_size, config.max_unit_length)
        if prior is not None and len(prior) < len(stream) and info.tokens <= MOST_TOKENS_OF_A_BYTE * len(prior):
            coding, stream = PRIOR, prior
        else:
            head += varint(one.ztokens)
    rows = one.cu_segments.diff().tolist()
    if state == GENERATED and coding != PRIOR:
        head += b"".join(map(varint, [len(rows), *rows]))
    elif state != GENERATED and one.cu_text.diff().tolist() != _segments(info.tokens, config):
        raise ZBatchError(f"segments: expected {config.segment_length} text tokens in each but the last, got others")
    return coding << 4 | state << 1 | patch, head + join_parts([*parts, stream])


def read_document(kind: int, length: int, payload: bytes, digest: bytes, config: ZTokConfig) -> Stored:
    """The inverse of `write_document`, but for the Z-tokens.

    Args:
        length: bytes of the original; digest: its hash, where `is_exact` says that there is one.

    Raises:
        ZFileError: the bytes are no such document's.
    """
    coding, state, patched = kind >> 4, kind >> 1 & 7, kind & 1
    slots = config.emission == "slots"
    if state > AS_IT_IS or (patched and state not in (GUESSED, REMAINDER, CORRECTED)) or (coding != PACKED) != slots:
        raise ZFileError(f"expected a kind of document of such a codec, got {kind}: it is damaged")
    if state == GENERATED and length:
        raise ZFileError(f"expected no original of generated Z-tokens, got one of {length} bytes: it is damaged")
    tokens, at = _count(payload, 0, "tokens")
    hundredths, at = _count(payload, at, "ratio")
    levels, ztokens, rows = config.num_codebooks, 0, None
    if coding == PACKED:
        levels, at = _count(payload, at, "levels")
    if coding != PRIOR:
        ztokens, at = _count(payload, at, "Z-tokens")
        if state == GENERATED:
            segments, at = _count(payload, at, "segments")
            if segments > len(payload) - at:
                raise ZFileError(f"expected {segments} segments, got {len(payload) - at} bytes: it is damaged")
            rows = []
            for _ in range(segments):
                row, at = _count(payload, at, "Z-tokens of a segment")
                rows.append(row)
    count = 1 + patched + (state >= REMAINDER)
    *parts, stream = split_parts(payload[at:], count)
    corrections = _corrections(state, patched, parts, length)
    info = DocumentInfo(
        tokens,
        hundredths / _HUNDREDTHS,
        levels,
        digest.hex() if state >= GUESSED else None,
        None if state == GENERATED else length,
        corrections,
    )
    info.validate(config.num_codebooks)
    if coding == PRIOR and tokens > MOST_TOKENS_OF_A_BYTE * len(stream):
        raise ZFileError(f"expected at most {MOST_TOKENS_OF_A_BYTE * len(stream)} tokens, got {tokens}: it is damaged")
    return Stored(info, coding, stream, ztokens, rows)


def read_ztokens(stored: Stored, config: ZTokConfig) -> ZTokens:
    """The Z-tokens of a document that are packed or coded adaptively.

    Raises:
        ZFileError: the stream holds no such Z-tokens.
    """
    ztokens, places = stored.ztokens, None
    if stored.coding == PACKED:
        codes, lengths = _unpack(stored, config)
    else:
        # A Z-token takes some bits of the stream, but no more than a few bytes may ask for much memory.
        if ztokens > MOST_ZTOKENS_OF_A_BYTE * len(stored.stream):
            raise ZFileError(f"expected a stream of {ztokens} Z-tokens, got {len(stored.stream)} bytes: it is damaged")
        codes, lengths, places = decode_slots(
            stored.stream, ztokens, config.num_codebooks, config.codebook_size, config.max_unit_length
        )
    ends, tokens = lengths.long().cumsum(0), stored.info.tokens
    if (int(ends[-1]) if ztokens else 0) != tokens:
        raise ZFileError(f"expected units of {tokens} tokens, got {int(ends[-1]) if ztokens else 0}: it is damaged")
    if stored.rows is None:
        cuts = torch.tensor(_segments(tokens, config), dtype=torch.int64).cumsum(0)
        last = torch.searchsorted(ends, cuts)
        if not torch.equal(ends[last], cuts):
            raise ZFileError("expected units that end where segments do, got others: it is damaged")
        cu_segments = torch.nn.functional.pad(last + 1, (1, 0)).int()
    else:
        if sum(stored.rows) != ztokens:
            raise ZFileError(f"expected {ztokens} Z-tokens in its segments, got {sum(stored.rows)}: it is damaged")
        cu_segments = offsets(torch.tensor(stored.rows, dtype=torch.int64))
    one = torch.tensor([0, len(cu_segments) - 1], dtype=torch.int32)
    return ZTokens(codes, lengths, cu_segments, one, places)


def _count(payload: bytes, at: int, name: str) -> tuple[int, int]:
    value, at = read_varint(payload, at)
    if value > LARGEST_COUNT:
        raise ZFileError(f"{name}: expected at most {LARGEST_COUNT}, got {value}: it is damaged")
    return value, at


def _segments(tokens: int, config: ZTokConfig) -> list[int]:
    """Tokens of the segments of a document that was compressed."""
    return split_segments([tokens], config.segment_length)[0]


def _exactness(info: DocumentInfo) -> tuple[int, list[bytes], int]:
    """What is known of the text, the parts that store it, and whether one of them is a patch."""
    own = info.corrections
    if own is None:
        return (GENERATED if info.byte_length is None else LOSSY), [], 0
    if own.raw is not None:
        return AS_IT_IS, [zlib.compress(own.raw, 9)], 0
    state, parts = REMAINDER, [own.remainder or b""]
    if own.remainder is None:
        gaps, tokens = own.gaps.numpy(), own.tokens.numpy()
        widths = [bit_width(gaps), bit_width(tokens)]
        packed = b"".join(pack_codes(values, bits).tobytes() for values, bits in zip((gaps, tokens), widths))
        state, parts = CORRECTED, [varint(len(gaps)) + bytes(widths) + packed]
    elif not own.remainder:
        state, parts = GUESSED, []
    if own.patch is None:
        return state, parts, 0
    patch = own.patch
    numbers = (patch.start, patch.end - patch.start, len(patch.replacement))
    return state, [*parts, b"".join(map(varint, numbers)) + zlib.compress(patch.replacement, 9)], 1


def _corrections(state: int, patched: int, parts: Sequence[bytes], length: int) -> Corrections | None:
    if state < GUESSED:
        return None
    if state == AS_IT_IS:
        return Corrections.stored_raw(_inflate(parts[0], length))
    if state == CORRECTED:
        own = _read_corrections(parts[0])
    else:
        own = Corrections.of_remainder(parts[0] if state == REMAINDER else b"")
    if patched:
        start, at = read_varint(parts[-1], 0)
        replaced, at = read_varint(parts[-1], at)
        size, at = read_varint(parts[-1], at)
        if size > length:
            raise ZFileError(f"patch: expected at most {length} bytes, those of the original, got {size}")
        own.patch = Patch(start, start + replaced, _inflate(parts[-1][at:], size))
    return own


def _read_corrections(data: bytes) -> Corrections:
    count, at = _count(data, 0, "corrections")
    widths = data[at : at + 2]
    sizes = [packed_size(count, bits) for bits in widths if 1 <= bits <= MAX_BITS]
    if len(sizes) < 2 or sum(sizes) != len(data) - at - 2:
        raise ZFileError(f"corrections: expected {count} in {len(data) - at} bytes, got more or fewer: it is damaged")
    first = at + 2 + sizes[0]
    gaps = _unpacked(data[at + 2 : first], widths[0], count)
    values = ((gaps + 1).cumsum() - 1, _unpacked(data[first:], widths[1], count))
    if count and max(int(own.max()) for own in values) > LARGEST_COUNT:
        raise ZFileError("corrections: expected 32-bit integers, got larger ones: it is damaged")
    positions, tokens = (torch.from_numpy(own.astype(np.int32)) for own in values)
    return Corrections(positions, tokens)


def _pack(one: ZBatch, config: ZTokConfig) -> bytes:
    codes = pack_codes(one.codes[:, : one.documents[0].levels].numpy(), bits_for(config.codebook_size))
    return codes.tobytes() + pack_codes(one.unit_lengths.numpy() - 1, bits_for(config.max_unit_length)).tobytes()


def _unpack(stored: Stored, config: ZTokConfig) -> tuple[torch.Tensor, torch.Tensor]:
    count, levels, width = stored.ztokens, stored.info.levels, config.num_codebooks
    bits = bits_for(config.codebook_size), bits_for(config.max_unit_length)
    first = packed_size(count * levels, bits[0])
    if first + packed_size(count, bits[1]) != len(stored.stream):
        raise ZFileError(f"expected {count} Z-tokens, got {len(stored.stream)} bytes of them: it is damaged")
    codes = _unpacked(stored.stream[:first], bits[0], count * levels).reshape(count, levels)
    lengths = _unpacked(stored.stream[first:], bits[1], count) + 1
    codes = np.pad(codes, ((0, 0), (0, width - levels)), constant_values=-1)
    return torch.from_numpy(codes.astype(np.int32)), torch.from_numpy(lengths.astype(np.int32))


def _unpacked(data: bytes, bits: int, count: int) -> np.ndarray:
    try:
        return unpack_codes(data, bits, count)
    except ValueError as error:
        raise ZFileError(str(error)) from error


def _inflate(data: bytes, length: int) -> bytes:
    # Never more than was stated: a few bytes can inflate to gigabytes.
    inflater = zlib.decompressobj()
    try:
        found = inflater.decompress(data, length + 1)
    except (zlib.error, OverflowError) as error:
        raise ZFileError(f"expected a zlib stream, got {error}: it is damaged") from error
    if len(found) != length or not inflater.eof or inflater.unused_data:
        raise ZFileError(f"expected a zlib stream of {length} bytes, got another length: it is damaged")
    return found
