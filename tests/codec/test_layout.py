"""Index arithmetic of packed batches, against loops over lists."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.codec.tiny_codec import tiny_codec
from ztok_fast.codec.layout import (
    block_bounds,
    expand_ranges,
    offsets,
    position_in_sequence,
    sequence_of_row,
    split_segments,
)
from ztok_fast.codec.ztokens import ZTokens

lengths_list = st.lists(st.integers(0, 5), min_size=1, max_size=6)


@given(lengths_list)
def test_rows_know_their_sequence_and_position(lengths):
    cu, total = offsets(torch.tensor(lengths)), sum(lengths)
    assert cu.dtype == torch.int32 and cu.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert sequence_of_row(cu, total).tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert position_in_sequence(cu, total).tolist() == [j for n in lengths for j in range(n)]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=5))
def test_expanded_ranges(ranges):
    begin = torch.tensor([b for b, _ in ranges])
    rows, cu = expand_ranges(begin, begin + torch.tensor([n for _, n in ranges]))
    assert rows.tolist() == [r for b, n in ranges for r in range(b, b + n)]
    assert cu.diff().tolist() == [n for _, n in ranges]


@given(st.lists(st.integers(0, 40), max_size=5), st.integers(1, 12))
def test_segments_cover_their_documents(lengths, size):
    segments, counts = split_segments(lengths, size)
    at = 0
    for length, count in zip(lengths, counts):
        own = segments[at : at + count]
        assert sum(own) == length and all(n == size for n in own[:-1]) and all(0 < n <= size for n in own)
        at += count
    assert at == len(segments)


@given(st.integers(0, 40), st.integers(1, 8))
def test_blocks_cover_all_columns_evenly(size, blocks):
    bounds = block_bounds(size, blocks)
    assert [b for b, _ in bounds] == [0, *(e for _, e in bounds[:-1])] and bounds[-1][1] == size
    widths = [e - b for b, e in bounds]
    assert len(widths) == blocks and max(widths) - min(widths) <= 1


def ztokens(lengths, cu_segments, cu_documents):
    lengths, cu_segments, cu_documents = (torch.tensor(v).int() for v in (lengths, cu_segments, cu_documents))
    return ZTokens(torch.zeros(len(lengths), 2, dtype=torch.int32), lengths, cu_segments, cu_documents)


def test_positions_of_units():
    z = ztokens([3, 1, 4, 5, 2], [0, 3, 5], [0, 2])
    expected = {"start": [0, 3, 4, 0, 5], "center": [1, 3, 6, 2, 6], "end": [2, 3, 7, 4, 6]}
    for place, positions in expected.items():
        model = tiny_codec(z_position=place).model
        assert model.unit_positions(z).tolist() == positions


def test_prefix_holds_the_context_segments_of_the_same_document():
    model = tiny_codec(context_segments=1).model
    # Segments 0 to 2 are one document (16, 16 and 4 tokens), segment 3 another.
    rows, positions, cu = model.prefix(ztokens([8, 8, 16, 4, 7], [0, 2, 3, 4, 5], [0, 3, 4]))
    assert rows.tolist() == [0, 1, 0, 1, 2, 2, 3, 4]
    assert cu.tolist() == [0, 2, 5, 7, 8]
    # Own segments start at position 16 (one context segment), the context's at 0.
    assert positions.tolist() == [16, 24, 0, 8, 16, 0, 16, 16]
