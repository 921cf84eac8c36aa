"""Plain PyTorch nearest-code search: the definition that every other backend is tested against.

One matrix product per block of rows finds the candidates; whatever lies within the rounding of that product of the
best is compared again term by term, so that the choice does not depend on how the product was summed and equal codes
go to the lowest index.
"""

import torch

from ztok_fast.ops.checks import compute_dtype
from ztok_fast.ops.op import vjp
from ztok_fast.ops.straight_through import straight_through

# elements of the largest temporary block, which bounds the extra memory whatever M is
_BLOCK_ELEMENTS = 1 << 20


def _unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows divided by their length; a row that is zero or has NaN becomes zero and has no gradient."""
    has_length = rows.detach().square().sum(-1, keepdim=True) > 0
    rows = torch.where(has_length, rows, 0)
    return rows * torch.where(has_length, rows.square().sum(-1, keepdim=True), 1).rsqrt()


def _direct_scores(rows: torch.Tensor, codes: torch.Tensor, metric: str) -> torch.Tensor:
    """The quantity to be minimised between matching rows and codes [P, d], float64 [P]."""
    if metric == "l2":
        return (rows - codes).square().sum(-1)
    return -(rows * codes).sum(-1)


def _rerank_near_ties(rows, book, near, best, metric):
    """Among the codes marked in `near` [m, V], the one with the least direct score; the lowest index among equals."""
    contested = (near.sum(1) > 1).nonzero()[:, 0]
    codes_per_step = max(1, _BLOCK_ELEMENTS // book.shape[1])
    for some in contested.split(max(1, codes_per_step // book.shape[0])):
        row, code = near[some].nonzero(as_tuple=True)
        scores = torch.full((some.shape[0], book.shape[0]), torch.inf, dtype=book.dtype, device=book.device)
        for start in range(0, row.shape[0], codes_per_step):
            r, c = row[start : start + codes_per_step], code[start : start + codes_per_step]
            scores[r, c] = _direct_scores(rows[some[r]], book[c], metric)
        least = scores.min(1, keepdim=True).values
        # argmax of the first True, said so that no backend's tie rule matters
        order = torch.arange(book.shape[0], device=book.device)
        best[some] = torch.where(scores == least, order, book.shape[0]).min(1).values
    return best


def nearest_codes(rows: torch.Tensor, book: torch.Tensor, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest code of each row and its distance.

    Args:
        rows: float32 or float64 [M, d].
        book: same dtype [V, d], finite.
        metric: "l2", "cosine" or "dot".

    Returns:
        Codes int64 [M] and distances [M] in the dtype of `rows`. Non-finite rows get code 0 and distance NaN.
    """
    finite = torch.isfinite(rows).all(1)
    # float64 products: squares of any float32 neither overflow nor vanish
    rows64 = torch.where(finite[:, None], rows, 0).double()
    book64 = book.double()
    if metric == "cosine":
        rows64, book64 = _unit_rows(rows64), _unit_rows(book64)
    norms = book64.square().sum(1)
    offset = norms / 2 if metric == "l2" else torch.zeros_like(norms)
    # the rounding error of one score is bounded from the longest code and the row's own length
    longest = norms.max().sqrt()
    relative = 4 * (book.shape[1] + 4) * torch.finfo(torch.float64).eps
    best = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    step = max(1, _BLOCK_ELEMENTS // book.shape[0])
    for start in range(0, rows.shape[0], step):
        block = rows64[start : start + step]
        scores = torch.addmm(offset, block, book64.T, alpha=-1)  # [step, V]
        least, codes = scores.min(1)
        error_bound = relative * longest * (block.norm(dim=1) + longest)
        near = scores <= (least + error_bound)[:, None]
        best[start : start + step] = _rerank_near_ties(block, book64, near, codes, metric)
    distances = _direct_scores(rows64, book64[best], metric)
    if metric == "cosine":
        distances = 1 + distances
    return torch.where(finite, best, 0), torch.where(finite, distances, torch.nan).to(rows.dtype)


def distance_and_terms(rows, codes, metric):
    """Distances [M] between matching rows and codes [M, d], differentiable, and the sums of their terms' sizes."""
    if metric == "l2":
        distances = (rows - codes).square().sum(-1)
        return distances, distances.detach()
    if metric == "cosine":
        rows, codes = _unit_rows(rows), _unit_rows(codes)
        return 1 - (rows * codes).sum(-1), 1 + (rows * codes).detach().abs().sum(-1)
    return -(rows * codes).sum(-1), (rows * codes).detach().abs().sum(-1)


def take_codes(book, codes):
    """Rows [M, d] of `book` [V, d], 0 where the code is -1; the gradient is summed in a fixed order."""
    return torch.where((codes >= 0)[:, None], book.index_select(0, codes.clamp(min=0).long()), 0)


def codebook_assign(x, codebooks, metric):
    """See `ztok_fast.ops.codebook_assign`; returns distances and codes."""
    if codebooks.ndim == 2:
        distances, codes = codebook_assign(x, codebooks[None], metric)
        return distances.squeeze(1), codes.squeeze(1)
    with torch.no_grad():
        codes = residual_codes(x, codebooks, metric)
    return _distances(x, codebooks, codes, metric), codes


def residual_codes(x, codebooks, metric, levels=None):
    """Codes int32 [M, L], -1 where a row does not use the level; `levels` [M] are those that each row uses, or all."""
    residual, codes = x.to(compute_dtype(x, codebooks)), []
    for level, book in enumerate(codebooks.to(residual.dtype)):
        code = nearest_codes(residual, book, metric)[0]
        codes.append(code if levels is None else torch.where(levels > level, code, -1))
        residual = residual - take_codes(book, codes[-1])
    return torch.stack(codes, 1).int()


def _distances(x, codebooks, codes, metric):
    """Distances [M, L] of given codes, differentiable; NaN for rows that are not finite."""
    dtype = compute_dtype(x, codebooks)
    residual, distances = x.to(dtype), []
    for book, code in zip(codebooks.to(dtype), codes.unbind(1)):
        chosen = take_codes(book, code)
        # float64 products: squares of any float32 neither overflow nor vanish
        distance, _ = distance_and_terms(residual.double(), chosen.double(), metric)
        finite = torch.isfinite(residual).all(1)
        distances.append(straight_through(torch.where(finite, distance, torch.nan), distance).to(dtype))
        residual = residual - chosen
    return torch.stack(distances, 1)


def codebook_assign_backward(x, codebooks, codes, grad_distances, metric):
    """Gradients of `x` [M, d] and `codebooks` [L, V, d] from that of the distances [M, L], the codes held fixed."""
    grads = vjp(lambda x, books: _distances(x, books, codes, metric), (x, codebooks), (grad_distances,))
    return tuple(grads)
