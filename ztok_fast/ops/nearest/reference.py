"""Plain PyTorch nearest-code search: the definition that every other backend is tested against.

One matrix product per block of rows finds the candidates; whatever lies within the rounding of that product of the
best is compared again term by term, so that the choice does not depend on how the product was summed and equal codes
go to the lowest index.
"""

import torch

from ztok_fast.ops.checks import compute_dtype
from ztok_fast.ops.segments import segment_sum

# elements of the largest temporary block, which bounds the extra memory whatever M is
_BLOCK_ELEMENTS = 1 << 20


def _unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows divided by their length; a zero row stays zero."""
    norms = rows.norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, rows / norms, 0)


def _direct_scores(rows: torch.Tensor, codes: torch.Tensor, metric: str) -> torch.Tensor:
    """The quantity to be minimised between matching rows and codes [P, d], float64 [P]."""
    if metric == "l2":
        return (rows - codes).square().sum(-1)
    return -(rows * codes).sum(-1)


def _settle_near_ties(rows, book, near, best, metric):
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
    # bound of the rounding error of one score, from the longest code and the row's own length
    longest = norms.max().sqrt()
    slack = 4 * (book.shape[1] + 4) * torch.finfo(torch.float64).eps
    best = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    step = max(1, _BLOCK_ELEMENTS // book.shape[0])
    for start in range(0, rows.shape[0], step):
        block = rows64[start : start + step]
        scores = torch.addmm(offset, block, book64.T, alpha=-1)  # [step, V]
        least, codes = scores.min(1)
        tolerance = slack * longest * (block.norm(dim=1) + longest)
        near = scores <= (least + tolerance)[:, None]
        best[start : start + step] = _settle_near_ties(block, book64, near, codes, metric)
    distances = _direct_scores(rows64, book64[best], metric)
    if metric == "cosine":
        distances = 1 + distances
    return torch.where(finite, best, 0), torch.where(finite, distances, torch.nan).to(rows.dtype)


def codebook_assign(x, codebook, metric):
    """See `ztok_fast.ops.nearest.contract.codebook_assign`; always with levels: returns distances and codes [M, L]."""
    dtype = compute_dtype(x, codebook)
    residual, books = x.to(dtype), codebook.to(dtype)
    codes, distances = [], []
    for book in books:
        code, distance = nearest_codes(residual, book, metric)
        residual = residual - book[code]
        codes.append(code)
        distances.append(distance)
    return torch.stack(distances, 1), torch.stack(codes, 1).int()


def _distance_gradients(residual, chosen, metric):
    """Derivatives of one level's distances by its residual and by the chosen code, both [M, d]."""
    if metric == "l2":
        difference = 2 * (residual - chosen)
        return difference, -difference
    if metric == "dot":
        return -chosen, -residual
    residual_norm = residual.norm(dim=1, keepdim=True)
    chosen_norm = chosen.norm(dim=1, keepdim=True)
    a, b = _unit_rows(residual), _unit_rows(chosen)
    cosine = (a * b).sum(1, keepdim=True)
    by_residual = torch.where(residual_norm > 0, (cosine * a - b) / residual_norm, 0)
    by_chosen = torch.where(chosen_norm > 0, (cosine * b - a) / chosen_norm, 0)
    return by_residual, by_chosen


def codebook_assign_backward(x, codebook, codes, grad_distances, metric):
    """Gradients of `x` [M, d] and `codebook` [L, V, d] from that of the distances [M, L], the codes held fixed."""
    dtype = compute_dtype(x, codebook)
    levels, size, _ = codebook.shape
    residual, books, grad = x.to(dtype), codebook.to(dtype), grad_distances.to(dtype)
    by_level = []
    for level in range(levels):
        chosen = books[level][codes[:, level].long()]
        by_level.append(_distance_gradients(residual, chosen, metric))
        residual = residual - chosen
    # residual_{l+1} = residual_l - chosen_l: what a level's residual gathers flows to all earlier codes as well
    grad_residual = torch.zeros_like(residual)
    grad_books = []
    for level in reversed(range(levels)):
        by_residual, by_chosen = by_level[level]
        grad_chosen = grad[:, level : level + 1] * by_chosen - grad_residual
        grad_books.append(segment_sum(grad_chosen, codes[:, level], size))
        grad_residual = grad_residual + grad[:, level : level + 1] * by_residual
    return grad_residual.to(x.dtype), torch.stack(grad_books[::-1]).to(codebook.dtype)
