import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.codec.documents import int32
from ztok_fast.codec.corrections import Corrections
from ztok_fast.codec.exact_patch import Patch


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=60))
def test_apply_turns_decoded_tokens_into_the_true_ones(pairs):
    decoded, true = (torch.tensor([pair[side] for pair in pairs], dtype=torch.int64) for side in (0, 1))
    wrong = (decoded != true).nonzero().reshape(-1)
    corrections = Corrections(wrong.to(torch.int32), true[wrong].to(torch.int32))
    corrections.validate(len(pairs))
    before = decoded.clone()
    assert torch.equal(corrections.apply(decoded), true)
    assert torch.equal(decoded, before)


@settings(deadline=None)
@given(st.sets(st.integers(0, 10_000)))
def test_gaps_are_distances_from_the_place_after_the_one_before(places):
    positions = int32(sorted(places))
    gaps = Corrections(positions, positions).gaps
    assert torch.equal((gaps + 1).cumsum(0).to(torch.int32) - 1, positions)
    assert not len(gaps) or int(gaps.min()) >= 0


def test_restore_returns_decoded_patched_or_raw_bytes():
    none = int32([])
    assert Corrections.none_needed().restore(b"decoded") == b"decoded"
    assert Corrections(none, none, Patch(0, 2, b"RE")).restore(b"decoded") == b"REcoded"
    assert Corrections.stored_raw(b"original").restore(b"decoded") == b"original"


def test_no_correction_takes_no_bytes():
    assert Corrections.none_needed().stored_bytes == 0


def test_stored_bytes_pack_gaps_and_tokens_to_the_bits_they_need():
    positions = int32(range(3, 64, 4))  # 16 gaps of 3: 2 bits each
    tokens = int32([1000] * 16)  # 10 bits each
    assert Corrections(positions, tokens).stored_bytes == 16 * 2 // 8 + 16 * 10 // 8


@pytest.mark.parametrize(
    ("original", "wrong", "raw"),
    [(b"a" * 100_000, 20_000, True), (random.Random(0).randbytes(4000), 10, False)],
    ids=["repetitive text, many mistakes", "dense text, few mistakes"],
)
def test_smallest_takes_the_raw_bytes_only_where_they_are_smaller(original, wrong, raw):
    chosen = Corrections(int32(range(wrong)), int32(range(wrong))).smallest(original, original)
    assert (chosen.raw is not None) == raw
    assert chosen.restore(original) == original


def test_smallest_adds_a_patch_where_the_tokens_do_not_round_trip():
    original = random.Random(1).randbytes(2000)
    decoded = original[:700] + b"??" + original[705:]
    chosen = Corrections.none_needed().smallest(decoded, original)
    assert chosen.patch == Patch(700, 702, original[700:705])
    assert chosen.restore(decoded) == original


def test_equality_sees_every_part():
    base = Corrections(int32([1]), int32([2]), Patch(0, 1, b"x"))
    assert base == Corrections(int32([1]), int32([2]), Patch(0, 1, b"x"))
    assert base != Corrections(int32([0]), int32([2]), Patch(0, 1, b"x"))
    assert base != Corrections(int32([1]), int32([3]), Patch(0, 1, b"x"))
    assert base != Corrections(int32([1]), int32([2]), Patch(0, 1, b"y"))
    assert base != Corrections(int32([1]), int32([2]))
    assert base != None  # noqa: E711 - the comparison itself is under test
