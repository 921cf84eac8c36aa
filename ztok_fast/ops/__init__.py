"""Tensor operations of the codec. They know nothing of models.

Every op has one contract (`contract.py` of its family: public function, checks, registration), a plain PyTorch
`reference.py` that defines its result, and possibly faster backends. See `ztok_fast.ops.requirements` for what runs
where and `ztok_fast.ops.dispatch` for how a backend is chosen.
"""

from ztok_fast.ops.dispatch import BackendUnavailable, backend

__all__ = [
    "BackendUnavailable",
    "backend",
]
