"""Baselines of `codebook_assign`."""

from __future__ import annotations

import torch

from bench.subject import Baseline, OpSubject, forward_float32, forward_only, same
from ztok_fast.ops.nearest.codebook_assign import check_codes

BLOCK = 1 << 21
"""Products per block of the torch baselines on the CPU: at 8 MB of fp32 they stay in the last cache. Fastest of 2¹⁸ to
2²⁴ here."""


def blocks(rows: int, size: int, device: torch.device) -> list[slice]:
    """Rows in blocks of about `BLOCK` products with `size` codes; of 128 times as many on a GPU."""
    step = max(1, (BLOCK if device.type == "cpu" else BLOCK << 7) // size)
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def _on_blocks(function):
    def prepare(case, inputs):
        x, codebook = inputs["x"], inputs["codebook"]
        prepared, parts = function(codebook), blocks(case["M"], case["V"], x.device)

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


def _product_fits(case):
    size = case["M"] * case["V"] * case.dtype.itemsize
    return "the product is above 256 MB" if size > 1 << 28 else forward_only(case)


def _makes_product(case):
    large = case["M"] * case["V"] > 1 << 28
    return forward_only(case) or ("makes the whole M x V product, above 1 GB" if large else None)


BASELINES = (
    Baseline("faiss", _faiss, lambda found: torch.from_numpy(found[1][:, 0]), "faiss", "faiss-cpu", devices=("cpu",),
             refuses=forward_float32, note="IndexFlatL2.search, k = 1, index built beforehand"),
    Baseline("addmm+argmin", _on_blocks(_addmm), same, refuses=forward_float32,
             note="in blocks of rows, norms made beforehand; codes only"),
    Baseline("cdist+argmin", _on_blocks(_cdist), same, refuses=forward_float32, note="in blocks of rows; codes only"),
    Baseline("vector-quantize-pytorch", _vector_quantize, lambda found: found[1][0], "vector_quantize_pytorch",
             "vector-quantize-pytorch", refuses=_makes_product,
             note="VectorQuantize in eval mode, its codebook overwritten"),
    Baseline("flash-kmeans", _flash_kmeans, lambda codes: codes[0], "flash_kmeans", "flash-kmeans", devices=("cuda",),
             refuses=forward_only, note="euclid_assign_triton, norms made beforehand"),
    Baseline("mm", _mm, kind="mark", refuses=_product_fits,
             note="the bare product x Cᵀ into memory that is there already"),
)  # fmt: skip


def _loose_check(inputs, codes):
    check_codes(inputs["x"], inputs["codebook"], codes, loose=True)


SUBJECTS = (OpSubject("codebook_assign", BASELINES, loose_check=_loose_check),)
