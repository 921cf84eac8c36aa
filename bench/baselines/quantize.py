"""Baselines of `residual_quantize` and `quantize_ragged`."""

from __future__ import annotations

import torch

from bench.baselines.nearest import blocks
from bench.subject import Baseline, OpSubject, forward_float32, forward_only
from ztok_fast import backend, ops
from ztok_fast.ops.quantize import reference
from ztok_fast.ops.quantize.residual_quantize import check_levels_searched
from ztok_fast.ops.spec import Mismatch


def _residual_vq(inputs):
    """vector-quantize-pytorch's layer in eval mode with the case's codebooks."""
    from vector_quantize_pytorch import ResidualVQ

    L, V, d = inputs["codebooks"].shape
    layer = ResidualVQ(dim=d, num_quantizers=L, codebook_size=V).eval().to(inputs["codebooks"].device)
    for own, book in zip(layer.layers, inputs["codebooks"]):
        own._codebook.embed.data.copy_(book[None])
    return layer


def _vector_quantize(case, inputs):
    layer, rows = _residual_vq(inputs), inputs["latents"][None]
    return lambda: layer(rows)


def _addmm_levels(case, inputs):
    latents, codebooks = inputs["latents"], inputs["codebooks"]
    norms = codebooks.square().sum(-1) / 2
    parts = blocks(case["M"], case["V"], latents.device)

    def call():
        residual, codes = latents, []
        for book, offset in zip(codebooks, norms):
            code = torch.cat([torch.addmm(offset, residual[p], book.T, alpha=-1).argmin(1) for p in parts])
            residual = residual - book[code]
            codes.append(code)
        return torch.stack(codes, 1), latents - residual

    return call


RESIDUAL = (
    Baseline("vector-quantize-pytorch", _vector_quantize, lambda found: found[1][0], "vector_quantize_pytorch",
             "vector-quantize-pytorch", refuses=forward_only,
             note="ResidualVQ in eval mode, its codebooks overwritten"),
    Baseline("addmm+argmin by level", _addmm_levels, lambda found: found[0], refuses=forward_float32,
             note="in blocks of rows, norms made beforehand; codes and their sum, no losses or usage"),
)  # fmt: skip


def _check_residual(inputs, codes):
    check_levels_searched(inputs["latents"], inputs["codebooks"], codes.reshape(len(inputs["latents"]), -1), loose=True)


_ARGUMENTS = ("hidden", "mass", "cu_seqlens", "end_weight", "mean_weight", "codebooks")


def _loop(case, inputs):
    """What is written first: integrate and fire by a loop over the sequences, then ResidualVQ."""
    hidden, mass, cu_seqlens, end_weight, mean_weight, codebooks = (inputs[name] for name in _ARGUMENTS)
    layer, starts = _residual_vq(inputs), cu_seqlens.tolist()

    def call():
        latents = []
        for start, stop in zip(starts, starts[1:]):
            rows, total = hidden[start:stop], mass[start:stop].cumsum(0)
            before = total - mass[start:stop]
            fired = total.floor() > before.floor()
            fired[-1] = True
            ends = fired.nonzero()[:, 0]
            # share of row t in unit u: the overlap of [before, total] with [u, u + 1]
            units = torch.arange(len(ends), device=hidden.device)[:, None]
            share = (torch.minimum(total, units + 1.0) - torch.maximum(before, units + 0.0)).clamp(min=0)
            means = share @ rows / share.sum(1, keepdim=True).clamp(min=1e-9)
            latents.append(rows[ends] @ end_weight.T + means @ mean_weight.T)
        latents = torch.cat(latents)
        latents = latents * torch.rsqrt(latents.square().mean(1, keepdim=True) + reference.RMS_EPS)
        return layer(latents[None])

    return call


def _check_ragged(inputs, codes):
    """A baseline need not tie the units to 2⁻²⁰ of the threshold: the share of units with the right codes counts."""
    codes = codes.reshape(-1, codes.shape[-1])
    with torch.no_grad(), backend("reference"):
        expected = ops.quantize_ragged(*(inputs[n] for n in _ARGUMENTS), total_units=inputs["total_units"]).codes
    if codes.shape != expected.shape:
        raise Mismatch(f"codes: expected {list(expected.shape)}, got {list(codes.shape)}")
    if (agree := float((codes == expected).all(1).float().mean())) < 0.98:
        raise Mismatch(f"codes: {agree:.1%} of the units agree with the reference")


RAGGED = (
    Baseline("loop + ResidualVQ", _loop, lambda found: found[1], "vector_quantize_pytorch", "vector-quantize-pytorch",
             refuses=forward_float32,
             note="integrate and fire by a loop over sequences, then vector-quantize-pytorch in eval mode"),
)  # fmt: skip

SUBJECTS = (
    OpSubject("residual_quantize", RESIDUAL, loose_check=_check_residual),
    OpSubject("quantize_ragged", RAGGED, ("halting_units",), loose_check=_check_ragged),
)
