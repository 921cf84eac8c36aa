"""`codebook_assign`: nearest code of each row."""

from __future__ import annotations

import torch

from bench.micro.case import BACKWARD, FORWARD, Case, Mismatch, Op, Peer, Work, close, randn, with_gradients
from ztok_fast import ops

BLOCK = 1 << 21
"""Products per block of the torch peers: at 8 MB of fp32 they stay in the last cache. Fastest of 2¹⁸ to 2²⁴ here."""
CHECKED_PRODUCTS = 1 << 30
"""Bound of (rows checked for optimality) x V x d: one float64 product of that size."""


def _cases() -> tuple[Case, ...]:
    found: dict[str, Case] = {}

    def add(M, V, d, smallest, direction=FORWARD, dtype=torch.float32, devices=("cpu", "cuda")):
        case = Case("codebook_assign", {"M": M, "V": V, "d": d}, dtype, direction, smallest, devices)
        found.setdefault(case.key, case)  # the smallest set that names a case comes first

    add(33, 50, 12, "tiny")
    add(17, 9, 5, "tiny", BACKWARD)
    for M, V, d in ((256, 1024, 128), (256, 4096, 64), (4096, 1024, 128)):
        add(M, V, d, "quick")
    for d in (16, 64, 96, 128, 576, 1024):  # 96: the shipped codec on SmolLM2
        add(256, 4096, d, "default")
    for M in (1, 256, 4096, 65536):
        add(M, 1024, 128, "default")
    for V in (1024, 4096, 65536):
        add(256, V, 128, "default")
    for d in (64, 576):
        add(4096, 4096, d, "default")
        add(1, 4096, d, "default")
    add(256, 4096, 128, "default", dtype=torch.bfloat16)
    add(4096, 1024, 128, "default", BACKWARD)
    for M in (4096, 65536):
        for V in (1024, 4096, 65536):
            for d in (64, 128, 576, 1024):
                add(M, V, d, "default", dtype=torch.bfloat16, devices=("cuda",))
    for M in (1, 256, 4096, 65536):
        for V in (1024, 4096, 65536):
            for d in (16, 64, 128, 576, 1024):
                add(M, V, d, "full")
    return tuple(found.values())


def make(case, device, generator):
    inputs = {
        "x": randn(generator, case["M"], case["d"], dtype=case.dtype),
        "codebook": randn(generator, case["V"], case["d"], dtype=case.dtype),
    }
    if case.direction == BACKWARD:
        inputs["grad"] = randn(generator, case["M"])
        for name in ("x", "codebook"):
            inputs[name].requires_grad_()
    return inputs


def run(case, inputs):
    result = ops.codebook_assign(inputs["x"], inputs["codebook"])
    if case.direction == FORWARD:
        return result.codes, result.distances
    grads = with_gradients([result.distances], [inputs["x"], inputs["codebook"]], [inputs["grad"]])
    return result.codes, result.distances, *grads


def some_rows(rows: int, products_per_row: int, device) -> torch.Tensor:
    """Rows to check for optimality: all where that is cheap, else evenly spread ones with the first and the last."""
    count = min(rows, max(2, CHECKED_PRODUCTS // products_per_row))
    return torch.linspace(0, rows - 1, count, device=device).round().long().unique()


def check_codes(x, codebook, codes, distances=None, loose=False):
    """Codes of one level: in range, the distance claimed is that of the code, and no code is nearer.

    A code that is not the float64 arg-min passes only within the rounding of float32 arithmetic on the terms of its
    distance (exactly the slack of the op's own tests), or with `loose` within that of |x|² - 2x·c + |c|².
    """
    eps = torch.finfo(torch.float32).eps
    x, codebook = x.detach().double(), codebook.detach().double()
    if codes.shape != (x.shape[0],) or int(codes.min()) < 0 or int(codes.max()) >= codebook.shape[0]:
        raise Mismatch(f"codes: expected [{x.shape[0]}] in [0, {codebook.shape[0]}), got {list(codes.shape)}")
    codes = codes.long()
    chosen = (x - codebook[codes]).square().sum(1)
    width = x.shape[1]
    if distances is not None:
        error = (distances.detach().double() - chosen).abs()
        allowed = 4 * ((width + 2) * eps * chosen) + eps * chosen
        if bool((error > allowed).any()) or bool(distances.isnan().any()):
            raise Mismatch(
                f"distances: off by up to {float((error / chosen.clamp(min=1e-30)).max()):.2e} of their value"
            )
    rows = some_rows(x.shape[0], codebook.shape[0] * width, x.device)
    best = _least_distances(x[rows], codebook)
    slack = 2 * (width + 2) * eps * chosen[rows]
    if loose:
        slack = (width + 4) * eps * (x[rows].norm(dim=1) + codebook.norm(dim=1).max()) ** 2
    worse = chosen[rows] - best > slack
    if bool(worse.any()):
        raise Mismatch(f"codes: {int(worse.sum())} of {len(rows)} rows checked have a nearer code")


def _least_distances(x, codebook):
    """The least squared distance of each row, by terms in float64."""
    scores = torch.addmm(codebook.square().sum(1) / 2, x, codebook.T, alpha=-1)
    nearest = scores.argmin(1)  # exact to about 1e-14, far below the float32 slack of the comparison
    return (x - codebook[nearest]).square().sum(1)


def check(case, inputs, result):
    x, codebook = inputs["x"], inputs["codebook"]
    check_codes(x, codebook, result[0], result[1])
    if case.direction == BACKWARD:
        leaves = [tensor.detach().double().requires_grad_() for tensor in (x, codebook)]
        exact = (leaves[0] - leaves[1][result[0].long()]).square().sum(1)  # the codes as given
        expected = with_gradients([exact], leaves, [inputs["grad"].double()])
        close(result[2], expected[0], case.dtype, 5, "gradient of x")
        close(result[3], expected[1], case.dtype, 5, "gradient of the codebook")


def check_peer(case, inputs, codes):
    check_codes(inputs["x"], inputs["codebook"], codes, loose=True)


def work(case, inputs):
    M, V, d, size = case["M"], case["V"], case["d"], case.dtype.itemsize
    least = Work(2.0 * M * V * d, (M + V) * d * size + 8 * M)
    if case.direction == BACKWARD:
        return Work(least.flops + 6.0 * M * d, least.bytes + (3 * M + V) * d * size + 8 * M)
    return least


def blocks(rows: int, size: int, block: int = BLOCK) -> list[slice]:
    step = max(1, block // size)
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def _forward_only(case):
    return None if case.direction == FORWARD else "forward only"


def _in_float32(case):
    return _forward_only(case) or (None if case.dtype == torch.float32 else "takes float32")


def _product_fits(case):
    if case["M"] * case["V"] * case.dtype.itemsize > 1 << 28:
        return "the product is above 256 MB"
    return _forward_only(case)


def _on_blocks(function):
    def prepare(case, inputs):
        x, codebook = inputs["x"], inputs["codebook"]
        prepared = function(codebook)
        parts = blocks(case["M"], case["V"], BLOCK if x.device.type == "cpu" else BLOCK << 7)

        def call():
            codes = [prepared(x[part]) for part in parts]
            return codes[0] if len(codes) == 1 else torch.cat(codes)

        return call

    return prepare


def _addmm(codebook):
    offset = codebook.square().sum(1) / 2
    return lambda rows: torch.addmm(offset, rows, codebook.T, alpha=-1).argmin(1)


def _cdist(codebook):
    return lambda rows: torch.cdist(rows, codebook).argmin(1)


def _faiss(case, inputs):
    import faiss

    index = faiss.IndexFlatL2(case["d"])
    index.add(inputs["codebook"].numpy())
    queries = inputs["x"].numpy()
    return lambda: index.search(queries, 1)


def _vector_quantize(case, inputs):
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(dim=case["d"], codebook_size=case["V"]).eval().to(inputs["x"].device)
    layer._codebook.embed.data.copy_(inputs["codebook"][None])
    rows = inputs["x"][None]
    return lambda: layer(rows)


def _flash_kmeans(case, inputs):
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    x, codebook = inputs["x"][None], inputs["codebook"][None]
    x_sq, c_sq = x.float().square().sum(-1), codebook.float().square().sum(-1)
    return lambda: euclid_assign_triton(x, codebook, x_sq, c_sq=c_sq)


def _mm(case, inputs):
    x, codes = inputs["x"], inputs["codebook"].T
    out = x.new_empty(case["M"], case["V"])
    return lambda: torch.mm(x, codes, out=out)


def _mm_blocks(case, inputs):
    x, codes = inputs["x"], inputs["codebook"].T
    parts = blocks(case["M"], case["V"], BLOCK if x.device.type == "cpu" else BLOCK << 7)
    out = x.new_empty(parts[0].stop, case["V"])

    def call():
        for part in parts:
            torch.mm(x[part], codes, out=out[: part.stop - part.start])

    return call


PEERS = (
    Peer(
        "faiss",
        _faiss,
        lambda found: torch.from_numpy(found[1][:, 0]),
        "faiss",
        "faiss-cpu",
        devices=("cpu",),
        refuses=_in_float32,
        note="IndexFlatL2.search, k = 1, index built beforehand",
    ),
    Peer(
        "addmm+argmin",
        _on_blocks(_addmm),
        lambda codes: codes,
        refuses=_in_float32,
        note="in blocks of rows, norms made beforehand; codes only",
    ),
    Peer(
        "cdist+argmin",
        _on_blocks(_cdist),
        lambda codes: codes,
        refuses=_in_float32,
        note="in blocks of rows; codes only",
    ),
    Peer(
        "vector-quantize-pytorch",
        _vector_quantize,
        lambda found: found[1][0],
        "vector_quantize_pytorch",
        "vector-quantize-pytorch",
        refuses=lambda case: (
            _forward_only(case)
            or ("makes the whole M x V product, above 1 GB" if case["M"] * case["V"] > 1 << 28 else None)
        ),
        note="VectorQuantize in eval mode, its codebook overwritten",
    ),
    Peer(
        "flash-kmeans",
        _flash_kmeans,
        lambda codes: codes[0],
        "flash_kmeans",
        "flash-kmeans",
        devices=("cuda",),
        refuses=_forward_only,
        note="euclid_assign_triton, norms made beforehand",
    ),
    Peer("mm", _mm, kind="mark", refuses=_product_fits, note="the bare product x Cᵀ into memory that is there already"),
    Peer(
        "mm in blocks",
        _mm_blocks,
        kind="mark",
        refuses=_forward_only,
        note="the same product in blocks of rows whose result stays in cache",
    ),
)

OP = Op(
    "codebook_assign",
    _cases(),
    make,
    lambda inputs: inputs["x"],
    run,
    check,
    work,
    check_peer,
    PEERS,
    flops_of_reference=3.0,
)
