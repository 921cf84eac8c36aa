"""`codebook_assign`: nearest-code search over one codebook or several residual levels.

Vector quantisation as in VQ-VAE (van den Oord et al., arXiv:1711.00937), residual levels as in SoundStream (Zeghidour
et al., arXiv:2107.03312).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import UP_TO_FLOAT32, cpp, triton
from ztok_fast.ops.nearest import reference
from ztok_fast.ops.op import Op
from ztok_fast.ops.spec import BACKWARD, Case, CaseTable, Mismatch, Spec, Work, randn, some_rows

METRICS = ("l2", "cosine", "dot")


class Assignment(NamedTuple):
    """Result of `codebook_assign`.

    Attributes:
        codes: int32 [M], or [M, L] for a codebook with levels.
        distances: float32 (float64 if an input is float64), same shape. Differentiable in both inputs.
    """

    codes: Tensor
    distances: Tensor


def codebook_assign(x: Tensor, codebook: Tensor, metric: str = "l2") -> Assignment:
    """The nearest code of each row.

    Distances are |x - c|^2 for "l2", 1 - cos(x, c) for "cosine" (1 where either is zero) and -x.c for "dot"; the least
    wins, the lowest index among equals. "Exact" means: the answer of float64 arithmetic, except where the two codes
    are there within rounding of each other.

    With L levels the search is residual: level l searches what the levels before it left over,
    x - c_0 - ... - c_{l-1}. The chosen rows are subtracted as they stand whatever the metric (for "cosine" too, which
    compares directions only), so that their sum is always the approximation of x. The residual is kept in float32
    (float64 if an input is float64) and rounded to it after every level.

    A row that holds NaN or infinity gets code 0 and distance NaN, at every level. The gradient of the distances takes
    the codes as given.

    O(M L V d) time; extra memory O(M d + L V d) at most, never of size M V. Backward O(M L d + L V d).

    Args:
        x: floating point [M, d]; M may be 0.
        codebook: floating point [V, d] or [L, V, d], finite and not empty.
        metric: "l2", "cosine" or "dot".

    Returns:
        `Assignment`.

    Raises:
        ValueError: bad rank, dtype, device, width or metric; a codebook that is empty or not finite.
    """
    return Assignment._make(CODEBOOK_ASSIGN(x, codebook, metric)[::-1])


def _check(x, codebook, metric) -> None:
    given = checks.Arguments("codebook_assign")
    given.tensor("x", x, "[M, d]")
    given.tensor("codebook", codebook, "[V, d] or [L, V, d]", empty=False)
    checks.check_choice("codebook_assign", "metric", metric, METRICS)


def _check_values(x: Tensor, codebooks: Tensor, metric: str) -> None:
    checks.check_finite_values("codebook_assign", "codebook", codebooks)


def _fake(x, codebooks, metric):
    shape = (x.shape[0], *codebooks.shape[:-2])
    return x.new_empty(shape, dtype=checks.compute_dtype(x, codebooks)), x.new_empty(shape, dtype=torch.int32)


def _backward(args, outputs, grads, needs):
    x, codebook, metric = args
    codes, grad = outputs[1], grads[0]
    if codebook.ndim == 3:
        return *CODEBOOK_ASSIGN_BACKWARD(x, codebook, codes, grad, metric), None
    by_x, by_codebook = CODEBOOK_ASSIGN_BACKWARD(x, codebook[None], codes[:, None], grad[:, None], metric)
    return by_x, by_codebook.squeeze(0), None


# --- specification


def make(sizes, dtype, generator):
    """Rows `M` and a codebook of `V` codes (`L` levels of them) of width `d`; `tie`: all codes are the same."""
    levels = sizes.get("L")
    codebook = randn(generator, *(() if levels is None else (levels,)), sizes["V"], sizes["d"], dtype=dtype)
    if sizes.get("tie"):
        codebook = codebook[..., :1, :].expand_as(codebook)
    x = randn(generator, sizes["M"], sizes["d"], dtype=dtype)
    return {"x": x, "codebook": codebook, "metric": sizes.get("metric", "l2")}


def check(inputs, result) -> None:
    """Codes and distances against float64, level by level."""
    x, codebook, metric = inputs["x"].detach(), inputs["codebook"].detach(), inputs["metric"]
    dtype = checks.compute_dtype(x, codebook)
    books = codebook if codebook.ndim == 3 else codebook[None]
    codes, distances = (t.reshape(x.shape[0], len(books)) for t in (result.codes, result.distances))
    residual = x.to(dtype)
    for level, book in enumerate(books.to(dtype)):
        check_codes(residual, book, codes[:, level], distances[:, level].detach(), metric)
        residual = residual - book[codes[:, level].long()]


def check_codes(x, codebook, codes, distances=None, metric="l2", loose=False) -> None:
    """Codes of one level: in range, the distance claimed is that of the code, and no code is nearer.

    A code that is not the float64 arg-min passes only within the rounding of float32 arithmetic on the terms of its
    distance, or with `loose` within that of |x|² - 2x·c + |c|².

    Raises:
        Mismatch: one of these does not hold.
    """
    eps = torch.finfo(checks.compute_dtype(x, codebook)).eps
    x, codebook = x.double(), codebook.double()
    size, width = codebook.shape
    if codes.shape != (x.shape[0],) or (codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < size):
        raise Mismatch(f"codes: expected [{x.shape[0]}] in [0, {size}), got {list(codes.shape)}")
    chosen, terms = reference.distance_and_terms(x, codebook[codes.long()], metric)
    allowed = (4 * (width + 2) + 1) * eps * terms
    if distances is not None and bool(((distances.double() - chosen).abs() > allowed).any()):
        raise Mismatch(f"distances: off by up to {float((distances.double() - chosen).abs().max()):.2e}")
    rows = some_rows(x.shape[0], size * width).to(x.device)
    best = reference.nearest_codes(x[rows], codebook, metric)[1]
    error_bound = 2 * (width + 2) * eps * terms[rows]
    if loose:
        error_bound = (width + 4) * eps * (x[rows].norm(dim=1) + codebook.norm(dim=1).max()) ** 2
    worse = chosen[rows] - best > error_bound
    if bool(worse.any()):
        raise Mismatch(f"codes: {int(worse.sum())} of {len(rows)} rows checked have a nearer code")


def _cases() -> tuple[Case, ...]:
    add = CaseTable("M", "V", "d")
    add(33, 50, 12, "tiny")
    add(17, 9, 5, "tiny", direction=BACKWARD)
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
    add(4096, 1024, 128, "default", direction=BACKWARD)
    for M in (4096, 65536):
        for V in (1024, 4096, 65536):
            for d in (64, 128, 576, 1024):
                add(M, V, d, "default", dtype=torch.bfloat16, devices=("cuda",))
    for M in (1, 256, 4096, 65536):
        for V in (1024, 4096, 65536):
            for d in (16, 64, 128, 576, 1024):
                add(M, V, d, "full")
    return add.cases()


def _work(case, inputs):
    M, V, d, size = case["M"], case["V"], case["d"], case.dtype.itemsize
    least = Work(2.0 * M * V * d, (M + V) * d * size + 8 * M)
    if case.direction == BACKWARD:
        return Work(least.flops + 6.0 * M * d, least.bytes + (3 * M + V) * d * size + 8 * M)
    return least


CODEBOOK_ASSIGN = Op(
    "codebook_assign(Tensor x, Tensor codebooks, str metric) -> (Tensor, Tensor)",
    reference=reference.codebook_assign,
    fake=_fake,
    backends=(cpp(UP_TO_FLOAT32, checks_values=True), triton("nearest.triton:codebook_assign")),
    backward=_backward,
    check=_check,
    check_values=_check_values,
    spec=Spec(
        codebook_assign,
        make,
        samples=(
            *(
                {"M": M, "V": V, "d": d, "L": 2, "metric": m}
                for M, V, d in ((1, 1, 1), (3, 17, 3), (37, 100, 17), (5, 9, 65))
                for m in METRICS
            ),
            {"M": 0, "V": 5, "d": 8},
            {"M": 33, "V": 50, "d": 12},
            {"M": 20, "V": 131, "d": 300},
            {"M": 40, "V": 33, "d": 16, "L": 3, "tie": True},
            {"M": 1, "V": 131, "d": 65, "L": 2},
            {"M": 1, "V": 33, "d": 16, "L": 3, "tie": True},
        ),
        check=check,
        differentiable=("x", "codebook"),
        outputs=lambda result: (result.distances,),
        tolerance=5,
        cases=_cases(),
        work=_work,
        flops_of_reference=3.0,
    ),
)

CODEBOOK_ASSIGN_BACKWARD = Op(
    "codebook_assign_backward(Tensor x, Tensor codebooks, Tensor codes, Tensor grad_distances, str metric)"
    " -> (Tensor, Tensor)",
    reference=reference.codebook_assign_backward,
    fake=lambda x, codebooks, *_: (x.new_empty(x.shape), codebooks.new_empty(codebooks.shape)),
    backends=(
        cpp(UP_TO_FLOAT32),
        triton("nearest.triton_gradients:codebook_assign_backward"),
    ),
)
