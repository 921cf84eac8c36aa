"""Inputs and loop-by-loop answers that the tests of the ragged ops share."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CU = torch.tensor([0, 1, 3])
LENGTHS = st.lists(st.integers(0, 6), max_size=6)
RAGGED = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def offsets(lengths, dtype=torch.int64, device="cpu"):
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(device, dtype)


def random_rows(shape, dtype=torch.float32, device="cpu"):
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, device=device).to(dtype)


def packed_by_loop(padded, lengths):
    rows = [padded[b, t] for b, length in enumerate(lengths) for t in range(length)]
    return torch.stack(rows) if rows else padded.new_empty(0, *padded.shape[2:])


def unpacked_by_loop(packed, lengths, max_length, fill):
    padded = packed.new_full((len(lengths), max_length, *packed.shape[1:]), fill)
    row = 0
    for b, length in enumerate(lengths):
        for t in range(length):
            padded[b, t] = packed[row]
            row += 1
    return padded


def gathered_by_loop(tables, indices, lengths):
    """Rows and (source, row of the source) of every output row, one at a time."""
    rows, origins = [], []
    for b in range(len(lengths[0])):
        for i, table in enumerate(tables):
            start = sum(lengths[i][:b])
            for k in range(start, start + lengths[i][b]):
                rows.append(table[k if indices[i] is None else int(indices[i][k])])
                origins.append((i, k))
    return torch.stack(rows) if rows else tables[0].new_empty(0, tables[0].shape[1]), origins


@st.composite
def sources(draw):
    """Lengths per source and whether each source is indexed."""
    num_sequences = draw(st.integers(0, 4))
    row = st.lists(st.integers(0, 4), min_size=num_sequences, max_size=num_sequences)
    return draw(st.lists(st.tuples(row, st.booleans()), min_size=1, max_size=4))


def build_sources(spec, dtype=torch.float32, device="cpu", index_dtype=torch.int64):
    tables, indices, lengths = [], [], []
    for source_lengths, indexed in spec:
        total = sum(source_lengths)
        num_rows = 5 if indexed else total
        tables.append(random_rows((num_rows, 3), dtype, device))
        indices.append(torch.randint(0, 5, (total,), device=device).to(index_dtype) if indexed else None)
        lengths.append(source_lengths)
    return tables, indices, lengths


MIXED = [([1, 2, 0], True), ([0, 0, 0], True), ([2, 0, 1], False), ([0, 3, 1], True)]
ALL_INDEXED = [([1, 2, 0], True), ([2, 0, 1], True)]


def move(value, device):
    """A tensor, or the tensors of a list, to a device; anything else as it is."""
    if isinstance(value, list):
        return [move(item, device) for item in value]
    return value.to(device) if torch.is_tensor(value) else value
