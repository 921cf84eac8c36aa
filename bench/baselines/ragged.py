"""Baselines of `ragged_pack`, `ragged_unpack` and `ragged_gather`."""

from __future__ import annotations

import torch

from bench.subject import Baseline, OpSubject, same
from ztok_fast.ops.spec import BACKWARD, equal


def _mask(case, inputs):
    """bool [B, S], True where there is a row: what a padded Hugging Face batch carries as its attention mask."""
    lengths = inputs["cu_seqlens"].diff()
    return torch.arange(case["S"], device=lengths.device)[None] < lengths[:, None]


def _calls(function, ready=lambda case, inputs: _mask(case, inputs)):
    """A baseline's `prepare` from (case, inputs, what is made beforehand) -> rows; adds the gradients."""

    def prepare(case, inputs):
        made = ready(case, inputs)

        def call():
            rows = function(case, inputs, made)
            return rows, inputs.gradients(rows) if case.direction == BACKWARD else ()

        return call

    return prepare


def _unpad(case, inputs, mask):
    """flash-attn's published unpadding: lengths, indices by `nonzero`, the longest read back, `index_select`."""
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero()[:, 0]
    int(lengths.max())
    torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return inputs["padded"].flatten(0, 1).index_select(0, indices)


def _masked_zeros(case, inputs, mask):
    padded = inputs["packed"].new_zeros(case["B"], case["S"], case["D"])
    padded[mask] = inputs["packed"]
    return padded


def _pad_by_index(case, inputs, indices):
    """flash-attn's published padding, with the indices that unpadding left."""
    padded = inputs["packed"].new_zeros(case["B"] * case["S"], case["D"])
    padded[indices] = inputs["packed"]
    return padded.view(case["B"], case["S"], case["D"])


def _masked_sources(case, inputs, masks):
    """What multimodal models do: the merged batch by boolean masks of its rows, one per source."""
    values = inputs["tables"][0].new_empty(len(masks[0]), case["D"])
    for mask, table, index in zip(masks, inputs["tables"], inputs["indices"]):
        values[mask] = table[index]
    return values


def _source_masks(case, inputs):
    lengths = [cu.diff().tolist() for cu in inputs["cu_seqlens"]]
    order = torch.cat([torch.tensor([i] * n) for parts in zip(*lengths) for i, n in enumerate(parts)])
    return [(order == i).to(inputs["tables"][0].device) for i in range(3)]


def _cat_by_sequence(case, inputs, lengths):
    """Each source looked up once, then torch.cat of slices sequence by sequence."""
    looked_up = [table[index] for table, index in zip(inputs["tables"], inputs["indices"])]
    parts = [rows.split(own) for rows, own in zip(looked_up, lengths)]
    return torch.cat([rows for sequence in zip(*parts) for rows in sequence])


def _like_result(case, inputs):
    """Bytes as many as those of the result's rows."""
    if "tables" in inputs:
        main, rows = inputs["tables"][0], sum(map(len, inputs["indices"]))
    elif "padded" in inputs:
        main, rows = inputs["padded"], inputs["total"]
    else:
        main, rows = inputs["packed"], case["B"] * case["S"]
    count = rows * case["D"] * case.dtype.itemsize
    return torch.empty(count, dtype=torch.uint8, device=main.device).fill_(1)


def _copy(case, inputs):
    source = _like_result(case, inputs)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _copied_bytes(case, inputs):
    return 2.0 * len(_like_result(case, inputs))


# A copy of the result and not of as many bytes as the op moves: what a large result takes of the system in fresh pages
# depends on its size, and can take longer than filling them.
MARKS = (
    Baseline("clone", lambda case, inputs: _like_result(case, inputs).clone, kind="mark",
             note="torch.clone of a tensor as large as the result", bytes=_copied_bytes),
    Baseline("copy", _copy, kind="mark", note="the same into memory that is there already", bytes=_copied_bytes),
)  # fmt: skip
PACK = (
    Baseline("boolean mask", _calls(lambda case, inputs, mask: inputs["padded"][mask]), same,
             note="padded[mask], the mask made beforehand"),
    Baseline("flash-attn unpad", _calls(_unpad), same,
             note="its published algorithm from the attention mask: sum, nonzero, max, cumsum, index_select"),
    *MARKS,
)  # fmt: skip
UNPACK = (
    Baseline("boolean mask", _calls(_masked_zeros), same, note="padded[mask] = packed on zeros"),
    Baseline("flash-attn pad", _calls(_pad_by_index, lambda c, i: _mask(c, i).flatten().nonzero()[:, 0]), same,
             note="its published algorithm, the indices made beforehand"),
    *MARKS,
)  # fmt: skip
GATHER = (
    Baseline("boolean masks", _calls(_masked_sources, _source_masks), same,
             note="values[mask] = table[index] for each source, masks made beforehand"),
    Baseline("cat by sequence", _calls(_cat_by_sequence, lambda c, i: [cu.diff().tolist() for cu in i["cu_seqlens"]]),
             same, note="a lookup per source, split, one torch.cat of all slices"),
    *MARKS,
)  # fmt: skip


class _Gather(OpSubject):
    """A baseline gives the gathered rows, without position ids and offsets."""

    def check_baseline(self, case, inputs, answer):
        values, grads = answer
        exact = self.exact(inputs)[0]
        equal(values.detach(), exact.values.detach().to(values.dtype), "values")
        self.check_gradients(case, inputs, exact, grads)


SUBJECTS = (
    OpSubject("ragged_pack", PACK, ("ragged_unpack",)),
    OpSubject("ragged_unpack", UNPACK, ("ragged_pack",)),
    _Gather("ragged_gather", GATHER, ("ragged_layout", "ragged_scatter_add")),
)
