"""Values that a decision made, with the gradient of what they stand for."""

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values, through):
        return values.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return None, grad

    @staticmethod
    def jvp(ctx, _, tangent):
        return tangent.clone()


def straight_through(values: Tensor, through: Tensor) -> Tensor:
    """`values`, with the gradient (in forward mode the tangent) of `through`, whatever that is worth there."""
    return _StraightThrough.apply(values, through)
