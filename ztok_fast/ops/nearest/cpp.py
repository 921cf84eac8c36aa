"""Nearest-code search of the compiled CPU library; the requirements table loads it before it chooses this."""

import torch

METRIC_NUMBERS = {"l2": 0, "cosine": 1, "dot": 2}


def codebook_assign(x, codebook, metric):
    """See `ztok_fast.ops.nearest.contract.codebook_assign`; always with levels: returns distances and codes [M, L].

    O(M L V d) time; O(M + L V d) extra memory, for few rows O(M).
    """
    return torch.ops.ztok.codebook_assign_native(x, codebook, METRIC_NUMBERS[metric])


def codebook_assign_backward(x, codebook, codes, grad_distances, metric):
    """See `ztok_fast.ops.nearest.reference.codebook_assign_backward`; csrc/cpu/code_gradients.cpp.

    O(M L d + L V d) time; O(L V d) extra memory if the codebook is not float32, and O(M L) for "cosine".
    """
    return torch.ops.ztok.codebook_assign_backward_native(x, codebook, codes, grad_distances, METRIC_NUMBERS[metric])
