"""A second backend of `codebook_assign`, recognised by its results, for tests of how a backend is chosen."""

from pathlib import Path

import pytest
import torch

from ztok_fast import ops
from ztok_fast.ops import backends
from ztok_fast.ops.backends import Backend
from ztok_fast.ops.nearest import reference
from ztok_fast.ops.op import OPS

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ASSIGN = OPS["codebook_assign"]


def marked_codebook_assign(x, codebook, metric):
    """A second backend of `codebook_assign`, recognised by its codes: of equal ones not the lowest."""
    distances, codes = reference.codebook_assign(x, codebook, metric)
    return distances, codes + 2


def marked_codebook_assign_backward(x, codebook, codes, grad_distances, metric):
    """Its backward pass, recognised by its gradient."""
    return torch.full_like(x, 1000.0), torch.zeros_like(codebook)


MODULE = "tests.ops.marked_backend"
# "cuda" is a name that `codebook_assign` has no backend of
MARKED_ROW = Backend(
    "cuda",
    f"{MODULE}:marked_codebook_assign",
    "cpu",
    dtypes=(torch.float32,),
    condition=("the width is at most 8", lambda x, *_: x.shape[1] <= 8),
)


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    """Whatever ZTOK_BACKEND says."""
    monkeypatch.setattr(backends._forced, "by_op", {})


def prefer(monkeypatch, op, *rows, only=False):
    """Put backends before those of an op, or in their place."""
    monkeypatch.setattr(op, "backends", rows if only else (*rows, *op.backends))
    monkeypatch.setattr(op, "_chosen", {})


@pytest.fixture
def marked(monkeypatch):
    """A preferred backend with every kind of limit."""
    prefer(monkeypatch, ASSIGN, MARKED_ROW)
    return MARKED_ROW


@pytest.fixture
def marked_backward(marked, monkeypatch):
    """The same backend with a backward pass."""
    row = Backend("cuda", f"{MODULE}:marked_codebook_assign_backward", condition=MARKED_ROW.condition)
    prefer(monkeypatch, OPS["codebook_assign_backward"], row)


def assign(width=4, dtype=torch.float32, rows=2):
    codes, _ = ops.codebook_assign(torch.ones(rows, width, dtype=dtype), torch.ones(3, width, dtype=dtype))
    return codes.tolist()


def distances(width=4, device="cpu"):
    """A leaf and distances that depend on it."""
    x = torch.ones(2, width, device=device, requires_grad=True)
    return x, ops.codebook_assign(x, torch.zeros(3, width, device=device), "dot").distances.sum()


def gradient(width=4):
    x, total = distances(width)
    return torch.autograd.grad(total, x)[0].unique().tolist()


REFERENCE, MARKED = [0, 0], [2, 2]
REFERENCE_GRADIENT, MARKED_GRADIENT = [0.0], [1000.0]
