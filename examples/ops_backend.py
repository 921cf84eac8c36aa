"""Use the ops as an accelerated backend: a residual vector quantiser as a torch module, compiled and trained.

    python examples/ops_backend.py
    python examples/ops_backend.py --backend reference      # the same in plain PyTorch

`ops.residual_quantize` searches all levels in one call. Its gradients are those of a VQ-VAE: straight through to the
input, the commitment loss to the input, the codebook loss to the codebooks.
"""

import argparse

import torch
from torch import Tensor, nn

import ztok_fast
from ztok_fast import ops


class ResidualVQ(nn.Module):
    """Quantise the last dimension of a tensor with L codebooks of V codes."""

    def __init__(self, levels: int, codes: int, width: int, commitment: float = 0.25) -> None:
        super().__init__()
        self.codebooks = nn.Parameter(torch.randn(levels, codes, width) / width**0.5)
        self.commitment = commitment

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., d] -> quantised x [..., d], codes int32 [..., L], loss."""
        result = ops.residual_quantize(x.reshape(-1, x.shape[-1]), self.codebooks)
        loss = result.codebook_loss + self.commitment * result.commitment
        return result.quantized.view_as(x), result.codes.view(*x.shape[:-1], -1), loss


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train the codebooks for some steps; returns the error before and after."""
    parser = argparse.ArgumentParser(description="A residual vector quantiser on ztok_fast.ops, compiled and trained.")
    parser.add_argument("--backend", choices=("cpp", "cuda", "triton", "reference"), help="default: the best one")
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile (default: inductor)")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = ResidualVQ(levels=4, codes=64, width=32).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend=options.compiler)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    data = torch.randn(8, 64, 32, device=device)  # batch, time, width

    def step() -> float:
        quantized, codes, loss = compiled(data)
        assert codes.shape == (8, 64, 4) and codes.dtype == torch.int32
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return float((quantized.detach() - data).square().mean())

    if options.backend is None:
        errors = [step() for _ in range(options.steps)]
    else:
        with ztok_fast.backend(options.backend):  # an error where it cannot run; nothing falls back in silence
            errors = [step() for _ in range(options.steps)]
    print(f"mean squared error on {device}: {errors[0]:.3f} before, {errors[-1]:.3f} after {options.steps} steps")
    return errors[0], errors[-1]


if __name__ == "__main__":
    main()
