"""How far a backend may be from the float64 answer, per dtype of the input; the one place that says so."""

import torch

import ztok_fast

# dtype of the input -> (relative, absolute) tolerance of a result accumulated in float32 (float64 for float64)
TOLERANCES = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (2e-5, 2e-6),
    torch.bfloat16: (1.6e-2, 1.6e-2),
    torch.float16: (2e-3, 2e-3),
}

DTYPES = tuple(TOLERANCES)


def assert_close(actual, expected, dtype=None, scale=1.0):
    """Compare with a float64 answer at the tolerance of `dtype` (default: that of `actual`), `scale` times wider."""
    rtol, atol = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(
        actual.double(), expected.double().to(actual.device), rtol=rtol * scale, atol=atol * scale
    )


def gradcheck(function, inputs, backend, device, **options):
    """`torch.autograd.gradcheck`. Interpreted kernels are too slow for it: their gradient in a random direction is
    compared with that of the reference, which is checked."""
    if (backend, device) != ("triton", "cpu"):
        return torch.autograd.gradcheck(function, inputs, **options)
    result = function(*inputs)
    direction = torch.randn_like(result)
    gradients = torch.autograd.grad(result, inputs, direction)
    with ztok_fast.backend("reference"):
        expected = torch.autograd.grad(function(*inputs), inputs, direction)
    for got, wanted in zip(gradients, expected, strict=True):
        assert_close(got, wanted)
    return True
