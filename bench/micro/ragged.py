"""`ragged_pack`, `ragged_unpack` and `ragged_gather`: moving rows between padded, packed and table layouts."""

from __future__ import annotations

import torch

from bench.micro.case import BACKWARD, FORWARD, Case, Op, Peer, Work, close, equal, randn, with_gradients
from bench.micro.shapes import LLAMA_7B, QWEN3, SMOLLM2, VOCABULARY, mixed_lengths, offsets, padding_mask
from ztok_fast import ops


def _cases(op):
    found: dict[str, Case] = {}

    def add(B, S, D, smallest, direction=FORWARD, dtype=torch.float32, devices=("cpu", "cuda")):
        case = Case(op, {"B": B, "S": S, "D": D}, dtype, direction, smallest, devices)
        found.setdefault(case.key, case)

    add(3, 7, 5, "tiny")
    add(3, 7, 5, "tiny", BACKWARD)
    add(16, 256, SMOLLM2[0], "quick")
    add(4, 64, SMOLLM2[0], "default")
    add(32, 512, SMOLLM2[0], "default")
    add(16, 1024, QWEN3[0], "default")
    add(16, 256, SMOLLM2[0], "default", dtype=torch.bfloat16)
    add(16, 256, SMOLLM2[0], "default", BACKWARD)
    add(8, 1024, LLAMA_7B[0], "full")
    for B, S, D in ((16, 512, SMOLLM2[0]), (64, 1024, QWEN3[0]), (64, 1024, LLAMA_7B[0])):
        for direction in (FORWARD, BACKWARD):
            add(B, S, D, "default", direction, torch.bfloat16, ("cuda",))
    return tuple(found.values())


def _batch(case, device, generator):
    lengths = mixed_lengths(case["B"], case["S"], generator)
    return {
        "lengths": lengths,
        "total": sum(lengths),
        "cu_seqlens": offsets(lengths, device),
        "mask": padding_mask(lengths, case["S"], device),
    }


def make_pack(case, device, generator):
    inputs = _batch(case, device, generator)
    inputs["padded"] = randn(generator, case["B"], case["S"], case["D"], dtype=case.dtype)
    if case.direction == BACKWARD:
        inputs["padded"].requires_grad_()
        inputs["grad"] = randn(generator, inputs["total"], case["D"], dtype=case.dtype)
    return inputs


def make_unpack(case, device, generator):
    inputs = _batch(case, device, generator)
    inputs["packed"] = randn(generator, inputs["total"], case["D"], dtype=case.dtype)
    if case.direction == BACKWARD:
        inputs["packed"].requires_grad_()
        inputs["grad"] = randn(generator, case["B"], case["S"], case["D"], dtype=case.dtype)
    return inputs


def _pack_with(function):
    def run(case, inputs):
        packed = function(inputs)
        if case.direction == FORWARD:
            return packed, ()
        return packed, with_gradients([packed], [inputs["padded"]], [inputs["grad"]])

    return run


run_pack = _pack_with(lambda inputs: ops.ragged_pack(inputs["padded"], inputs["cu_seqlens"], inputs["total"]))


def check_pack(case, inputs, found):
    packed, grads = found
    padded = inputs["padded"].detach()
    equal(packed.detach(), torch.cat([rows[:n] for rows, n in zip(padded, inputs["lengths"])]), "packed")
    if grads:
        equal(grads[0], _pad(inputs["grad"], case["S"], inputs["lengths"]), "gradient of padded")


def _pad(packed, longest, lengths):
    parts = packed.split(lengths)
    return torch.stack([torch.nn.functional.pad(rows, (0, 0, 0, longest - len(rows))) for rows in parts])


def _unpack_with(function):
    def run(case, inputs):
        padded = function(case, inputs)
        if case.direction == FORWARD:
            return padded, ()
        return padded, with_gradients([padded], [inputs["packed"]], [inputs["grad"]])

    return run


run_unpack = _unpack_with(
    lambda case, inputs: ops.ragged_unpack(inputs["packed"], inputs["cu_seqlens"], case["S"], 0.0)
)


def check_unpack(case, inputs, found):
    padded, grads = found
    equal(padded.detach(), _pad(inputs["packed"].detach(), case["S"], inputs["lengths"]), "padded")
    if grads:
        wanted = torch.cat([rows[:n] for rows, n in zip(inputs["grad"], inputs["lengths"])])
        equal(grads[0], wanted, "gradient of packed")


def work_pack(case, inputs):
    row = case["D"] * case.dtype.itemsize
    moved = 2.0 * inputs["total"] * row
    if case.direction == BACKWARD:
        moved += (inputs["total"] + case["B"] * case["S"]) * row
    return Work(0.0, moved)


def work_unpack(case, inputs):
    row = case["D"] * case.dtype.itemsize
    moved = (inputs["total"] + case["B"] * case["S"]) * float(row)
    if case.direction == BACKWARD:
        moved += 2.0 * inputs["total"] * row
    return Work(0.0, moved)


def _unpad(inputs):
    """flash-attn's published unpadding: lengths, indices by `nonzero`, the longest read back, rows by `index_select`."""
    mask, padded = inputs["mask"], inputs["padded"]
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero()[:, 0]
    int(lengths.max())
    torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return padded.flatten(0, 1).index_select(0, indices)


def _masked_zeros(case, inputs):
    mask, packed = inputs["mask"], inputs["packed"]
    padded = packed.new_zeros(case["B"], case["S"], case["D"])
    padded[mask] = packed
    return padded


def _pad_by_index(case, inputs):
    """flash-attn's published padding, with the indices that unpadding left (`nonzero` in `_prepare_indices`)."""
    packed = inputs["packed"]
    padded = packed.new_zeros(case["B"] * case["S"], case["D"])
    padded[inputs["indices"]] = packed
    return padded.view(case["B"], case["S"], case["D"])


def _caller(run):
    return lambda case, inputs: lambda: run(case, inputs)


def _prepare_indices(case, inputs):
    inputs = {**inputs, "indices": inputs["mask"].flatten().nonzero()[:, 0]}
    run = _unpack_with(_pad_by_index)
    return lambda: run(case, inputs)


def _result_bytes(case, inputs):
    rows = case["B"] * case["S"] if case.op == "ragged_unpack" else inputs["total"]
    return rows * case["D"] * case.dtype.itemsize


def _like_result(case, inputs):
    device = OPS_BY_NAME[case.op].main(inputs).device
    return torch.empty(_result_bytes(case, inputs), dtype=torch.uint8, device=device).fill_(1)


def _clone(case, inputs):
    return _like_result(case, inputs).clone


def _copy(case, inputs):
    source = _like_result(case, inputs)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _copied_bytes(case, inputs):
    return 2.0 * _result_bytes(case, inputs)


# A copy of the result and not of as many bytes as the op moves: what a large result takes of the system in fresh pages
# depends on its size, and can take longer than filling them.
MARKS = (
    Peer("clone", _clone, kind="mark", note="torch.clone of a tensor as large as the result", bytes=_copied_bytes),
    Peer("copy", _copy, kind="mark", note="the same into memory that is there already", bytes=_copied_bytes),
)


def _same(found):
    return found


PACK_PEERS = (
    Peer(
        "boolean mask",
        _caller(_pack_with(lambda inputs: inputs["padded"][inputs["mask"]])),
        _same,
        note="padded[mask], the mask made beforehand",
    ),
    Peer(
        "flash-attn unpad",
        _caller(_pack_with(_unpad)),
        _same,
        note="its published algorithm from the attention mask: sum, nonzero, max, cumsum, index_select",
    ),
    *MARKS,
)
UNPACK_PEERS = (
    Peer("boolean mask", _caller(_unpack_with(_masked_zeros)), _same, note="padded[mask] = packed on zeros"),
    Peer("flash-attn pad", _prepare_indices, _same, note="its published algorithm, the indices made beforehand"),
    *MARKS,
)

PACK = Op(
    "ragged_pack",
    _cases("ragged_pack"),
    make_pack,
    lambda inputs: inputs["padded"],
    run_pack,
    check_pack,
    work_pack,
    check_pack,
    PACK_PEERS,
    companions=("ragged_unpack",),
)
UNPACK = Op(
    "ragged_unpack",
    _cases("ragged_unpack"),
    make_unpack,
    lambda inputs: inputs["packed"],
    run_unpack,
    check_unpack,
    work_unpack,
    check_unpack,
    UNPACK_PEERS,
    companions=("ragged_pack",),
)


# --- gather: Z prefix from a table of code vectors, one separator, text from the embedding table


def _gather_cases():
    found: dict[str, Case] = {}

    def add(B, Z, S, D, R, smallest, direction=FORWARD, dtype=torch.float32, devices=("cpu", "cuda")):
        shape = {"B": B, "Z": Z, "S": S, "D": D, "R": R}
        case = Case("ragged_gather", shape, dtype, direction, smallest, devices)
        found.setdefault(case.key, case)

    add(3, 4, 7, 5, 40, "tiny")
    add(3, 4, 7, 5, 40, "tiny", BACKWARD)
    add(16, 64, 256, SMOLLM2[0], VOCABULARY, "quick")
    add(1, 16, 64, SMOLLM2[0], VOCABULARY, "default")
    add(32, 128, 512, SMOLLM2[0], VOCABULARY, "default")
    add(16, 128, 512, QWEN3[0], VOCABULARY, "default")
    add(16, 64, 256, SMOLLM2[0], 4096, "default", BACKWARD)
    add(8, 256, 1024, LLAMA_7B[0], VOCABULARY, "full")
    for direction in (FORWARD, BACKWARD):
        add(64, 256, 1024, QWEN3[0], VOCABULARY, "default", direction, torch.bfloat16, ("cuda",))
    return tuple(found.values())


def make_gather(case, device, generator):
    B, D, R = case["B"], case["D"], case["R"]
    z_lengths, text_lengths = mixed_lengths(B, case["Z"], generator), mixed_lengths(B, case["S"], generator)
    codes = max(2, R // 8)
    inputs = {
        "embedding": randn(generator, R, D, dtype=case.dtype),
        "z_rows": randn(generator, codes, D, dtype=case.dtype),
        "codes": torch.randint(0, codes, (sum(z_lengths),), generator=generator, device=device),
        "separator": torch.zeros(B, dtype=torch.int64, device=device),
        "tokens": torch.randint(0, R, (sum(text_lengths),), generator=generator, device=device),
        "lengths": [z_lengths, [1] * B, text_lengths],
    }
    inputs["cu_seqlens"] = [offsets(lengths, device) for lengths in inputs["lengths"]]
    inputs["total"] = sum(map(sum, inputs["lengths"]))
    if case.direction == BACKWARD:
        inputs["grad"] = randn(generator, inputs["total"], D, dtype=case.dtype)
        inputs["embedding"].requires_grad_()
        inputs["z_rows"].requires_grad_()
    return inputs


def _sources(inputs):
    tables = [inputs["z_rows"], inputs["embedding"], inputs["embedding"]]
    return tables, [inputs["codes"], inputs["separator"], inputs["tokens"]]


def _gradients(case, inputs, values):
    if case.direction == FORWARD:
        return ()
    return with_gradients([values], [inputs["z_rows"], inputs["embedding"]], [inputs["grad"]])


def run_gather(case, inputs):
    batch = ops.ragged_gather(*_sources(inputs), inputs["cu_seqlens"])
    return batch, _gradients(case, inputs, batch.values)


def _gathered(inputs):
    """Values and position ids by slicing and concatenating; the order of the rows of all sources with it."""
    tables, indices = _sources(inputs)
    parts = [index.split(lengths) for index, lengths in zip(indices, inputs["lengths"])]
    values, positions = [], []
    for b in range(len(parts[0])):
        rows = [table[part[b]] for table, part in zip(tables, parts)]
        values += rows
        positions.append(torch.arange(sum(map(len, rows)), device=tables[0].device))
    return torch.cat(values), torch.cat(positions)


def check_gather(case, inputs, found):
    batch, grads = found
    values, positions = _gathered({k: v.detach() if torch.is_tensor(v) else v for k, v in inputs.items()})
    equal(batch.values.detach(), values, "values")
    equal(batch.position_ids, positions, "position_ids")
    merged = offsets([sum(parts) for parts in zip(*inputs["lengths"])], values.device)
    equal(batch.cu_seqlens, merged, "cu_seqlens")
    _check_table_gradients(case, inputs, grads)


def check_gather_peer(case, inputs, found):
    values, grads = found
    equal(
        values.detach(), _gathered({k: v.detach() if torch.is_tensor(v) else v for k, v in inputs.items()})[0], "values"
    )
    _check_table_gradients(case, inputs, grads)


def _check_table_gradients(case, inputs, grads):
    if not grads:
        return
    wide = {k: v.detach().double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    leaves = [wide["z_rows"].requires_grad_(), wide["embedding"].requires_grad_()]
    expected = with_gradients([_gathered(wide)[0]], leaves, [wide["grad"]])
    for name, got, wanted in zip(("z_rows", "embedding"), grads, expected):
        close(got, wanted, case.dtype, 4, f"gradient of {name}")


def work_gather(case, inputs):
    row = case["D"] * case.dtype.itemsize
    moved = 2.0 * inputs["total"] * row + 16.0 * inputs["total"]
    if case.direction == BACKWARD:
        tables = inputs["embedding"].shape[0] + inputs["z_rows"].shape[0]
        moved += (inputs["total"] + tables) * row
    return Work(0.0, moved)


def _masked_sources(case, inputs):
    """What multimodal models do: the merged batch by boolean masks of its rows, one per source."""
    order = torch.cat([torch.tensor([i] * n) for parts in zip(*inputs["lengths"]) for i, n in enumerate(parts)])
    masks = [(order == i).to(inputs["codes"].device) for i in range(3)]

    def call():
        values = inputs["embedding"].new_empty(inputs["total"], case["D"])
        for mask, table, index in zip(masks, *_sources(inputs)):
            values[mask] = table[index]
        return values, _gradients(case, inputs, values)

    return call


def _cat_by_sequence(case, inputs):
    """Each source looked up once, then torch.cat of slices sequence by sequence."""

    def call():
        looked_up = [table[index] for table, index in zip(*_sources(inputs))]
        parts = [rows.split(lengths) for rows, lengths in zip(looked_up, inputs["lengths"])]
        values = torch.cat([rows for sequence in zip(*parts) for rows in sequence])
        return values, _gradients(case, inputs, values)

    return call


GATHER_PEERS = (
    Peer(
        "boolean masks",
        _masked_sources,
        _same,
        note="values[mask] = table[index] for each source, masks made beforehand",
    ),
    Peer("cat by sequence", _cat_by_sequence, _same, note="a lookup per source, split, one torch.cat of all slices"),
    *MARKS,
)

GATHER = Op(
    "ragged_gather",
    _gather_cases(),
    make_gather,
    lambda inputs: inputs["z_rows"],
    run_gather,
    check_gather,
    work_gather,
    check_gather_peer,
    GATHER_PEERS,
    companions=("ragged_layout", "ragged_scatter_add"),
)

OPS_BY_NAME = {op.name: op for op in (PACK, UNPACK, GATHER)}
