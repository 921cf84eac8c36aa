"""The carrier of codes, lengths and offsets: parts, selections and sections keep every row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ztok_fast.codec.layout import offsets
from ztok_fast.codec.ztokens import ZTokens, concatenate, no_documents


@st.composite
def documents(draw):
    """Z-tokens whose first code counts the rows."""
    segments = draw(st.lists(st.integers(0, 5), max_size=6))
    rows = draw(st.lists(st.integers(1, 4), min_size=sum(segments), max_size=sum(segments)))
    total = sum(rows)
    lengths = draw(st.lists(st.integers(1, 9), min_size=total, max_size=total))
    return ZTokens(
        torch.arange(2 * total, dtype=torch.int32).reshape(total, 2),
        torch.tensor(lengths, dtype=torch.int32),
        offsets(torch.tensor(rows, dtype=torch.int64)),
        offsets(torch.tensor(segments, dtype=torch.int64)),
    )


@given(documents(), st.data())
@settings(deadline=None)
def test_selected_documents_are_the_parts(z, data):
    chosen = data.draw(st.lists(st.integers(0, len(z) - 1), max_size=8)) if len(z) else []
    selected = z.select(chosen)
    assert selected.keys() == [z.keys()[i] for i in chosen] == [z.part(i).keys()[0] for i in chosen]
    assert len(selected) == len(chosen) and selected.cu_segments.dtype == selected.codes.dtype == torch.int32


@given(documents(), st.integers(1, 4))
@settings(deadline=None)
def test_sections_and_joined_are_inverse(z, most):
    sections, counts = z.sections(most)
    assert len(sections) == sum(counts) and len(counts) == len(z)
    assert int(sections.cu_documents.diff().max() if len(sections) else 0) <= most
    assert sections.cu_text.tolist() == z.cu_text.tolist()
    back = sections.joined(counts)
    assert back.cu_documents.tolist() == z.cu_documents.tolist() and back.keys() == z.keys()


@given(documents(), documents())
@settings(deadline=None)
def test_concatenated_documents_come_one_after_another(one, two):
    both = concatenate([no_documents(2), one, two])
    assert both.keys() == one.keys() + two.keys()
    assert len(both.first_segment) == len(both.cu_segments) - 1


def test_first_segment_and_text_offsets():
    cu = torch.tensor([0, 1, 3, 4], dtype=torch.int32)
    lengths = torch.tensor([4, 3, 1, 2], dtype=torch.int32)
    z = ZTokens(torch.zeros(4, 1, dtype=torch.int32), lengths, cu, torch.tensor([0, 2, 2, 3], dtype=torch.int32))
    assert z.first_segment.tolist() == [0, 0, 2]
    assert z.cu_text.tolist() == [0, 4, 8, 10] and z.cu_ztokens.tolist() == [0, 3, 3, 4]
