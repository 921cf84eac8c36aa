import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ztok_fast.codec.errors import ZBatchError
from ztok_fast.codec.exact_patch import Patch, apply_patch, make_patch

few_letters = st.binary(max_size=60).map(lambda data: bytes(byte % 3 for byte in data))


@settings(deadline=None)
@given(few_letters, few_letters)
@example(b"", b"")
@example(b"aba", b"aababa")
@example(b"aaaa", b"aa")
@example(b"aa", b"aaaa")
def test_a_patch_turns_one_text_into_the_other(decoded, original):
    patch = make_patch(decoded, original)
    assert apply_patch(decoded, patch) == original
    assert len(patch.replacement) <= len(original)


@settings(deadline=None)
@given(few_letters, few_letters, few_letters, few_letters)
def test_a_patch_is_no_longer_than_what_differs(before, old, new, after):
    patch = make_patch(before + old + after, before + new + after)
    assert len(patch.replacement) <= len(new)
    assert patch.end - patch.start <= len(old)


def test_equal_texts_give_an_empty_patch():
    assert make_patch(b"same", b"same") == Patch(4, 4, b"")


def test_only_the_changed_byte_of_a_megabyte_is_kept():
    text = b"\r\n" * 500_000
    changed = text[:600_000] + b"x" + text[600_001:]
    assert make_patch(text, changed) == Patch(600_000, 600_001, b"x")


def test_a_patch_for_a_longer_text_is_refused():
    with pytest.raises(ZBatchError, match="expected at least 5 bytes"):
        apply_patch(b"abcd", Patch(0, 5, b""))


@pytest.mark.parametrize(("start", "end"), [(-1, 0), (3, 2)])
def test_a_patch_of_an_impossible_range_is_refused(start, end):
    with pytest.raises(ZBatchError, match="0 <= start <= end"):
        Patch(start, end, b"")
