"""`residual_quantize` and `quantize_ragged`: the residual search alone, and fused with halting and projection."""

from __future__ import annotations

import torch

from bench.micro.case import BACKWARD, FORWARD, Case, Mismatch, Op, Peer, Work, close, equal, randn, with_gradients
from bench.micro.halting import some_mass
from bench.micro.nearest import blocks, check_codes
from bench.micro.shapes import mixed_lengths, offsets
from ztok_fast import ops
from ztok_fast.ops.halting import reference as halting_reference
from ztok_fast.ops.quantize import reference


def _residual_cases():
    found: dict[str, Case] = {}

    def add(M, L, V, d, smallest, direction=FORWARD, dtype=torch.float32, devices=("cpu", "cuda")):
        case = Case("residual_quantize", {"M": M, "L": L, "V": V, "d": d}, dtype, direction, smallest, devices)
        found.setdefault(case.key, case)

    add(19, 3, 31, 6, "tiny")
    add(19, 3, 31, 6, "tiny", BACKWARD)
    add(256, 4, 1024, 128, "quick")
    for M in (1, 256, 4096):
        add(M, 4, 1024, 128, "default")  # ztok-mini
        add(M, 4, 4096, 96, "default" if M < 4096 else "full")  # the codec on SmolLM2
    add(256, 8, 1024, 64, "default")
    add(256, 4, 1024, 576, "default")
    add(1024, 4, 1024, 128, "default", BACKWARD)
    for M in (4096, 65536):
        for V, d in ((1024, 128), (4096, 96), (4096, 1024)):
            add(M, 4, V, d, "default", dtype=torch.bfloat16, devices=("cuda",))
        add(M, 4, 4096, 96, "full")
    add(65536, 4, 1024, 128, "default", BACKWARD, devices=("cuda",))
    return tuple(found.values())


def make_residual(case, device, generator):
    """Codebooks whose levels shrink as trained ones do, so that every level's residual is of its codes' size."""
    L, V, d = case["L"], case["V"], case["d"]
    shrink = 0.6 ** torch.arange(L, device=device)[:, None, None]
    inputs = {
        "latents": randn(generator, case["M"], d, dtype=case.dtype),
        "codebooks": (randn(generator, L, V, d) * shrink).to(case.dtype),
    }
    if case.direction == BACKWARD:
        inputs["grad"] = randn(generator, case["M"], d, dtype=case.dtype)
        for name in ("latents", "codebooks"):
            inputs[name].requires_grad_()
    return inputs


def run_residual(case, inputs):
    result = ops.residual_quantize(inputs["latents"], inputs["codebooks"])
    if case.direction == FORWARD:
        return result, ()
    one = torch.ones_like(result.commitment)
    outputs = [result.quantized, result.commitment, result.codebook_loss]
    return result, with_gradients(outputs, [inputs["latents"], inputs["codebooks"]], [inputs["grad"], one, one])


def check_levels(latents, codebooks, codes, loose=False):
    """Codes of all levels against the residual that the levels before leave, kept in float32; returns their sum."""
    residual = latents.detach().float()
    total = torch.zeros_like(residual)
    for level, book in enumerate(codebooks.detach().float()):
        check_codes(residual, book, codes[:, level], loose=loose)
        chosen = book[codes[:, level].long()]
        residual = residual - chosen
        total = total + chosen
    return total


def check_residual(case, inputs, found):
    result, grads = found
    latents, codebooks = inputs["latents"], inputs["codebooks"]
    total = check_levels(latents, codebooks, result.codes)
    close(result.quantized, total, case.dtype, what="quantized")
    exact = [latents.detach().double().requires_grad_(), codebooks.detach().double().requires_grad_()]
    straight_through, commitment, codebook_loss = given_codes(*exact, result.codes)
    close(result.commitment, commitment, torch.float32, what="commitment")
    close(result.codebook_loss, codebook_loss, torch.float32, what="codebook loss")
    _check_usage(result.codes, result.usage)
    if grads:
        one = torch.ones_like(commitment)
        outputs = [straight_through, commitment, codebook_loss]
        expected = with_gradients(outputs, exact, [inputs["grad"].double(), one, one])
        for name, got, wanted in zip(("latents", "codebooks"), grads, expected):
            close(got, wanted, case.dtype, 5, f"gradient of the {name}")


def given_codes(latents, codebooks, codes):
    """Quantised rows (straight-through) and both losses for given codes, in terms that autograd differentiates."""
    partial, commitment, codebook_loss = torch.zeros_like(latents), 0.0, 0.0
    for level, book in enumerate(codebooks):
        partial = partial + book[codes[:, level].long()]
        commitment = commitment + (latents - partial.detach()).square().sum()
        codebook_loss = codebook_loss + (latents.detach() - partial).square().sum()
    count = max(1, codes.numel()) * latents.shape[1]
    return latents + (partial - latents).detach(), commitment / count, codebook_loss / count


def _check_usage(codes, usage):
    size = usage.shape[1]
    for level in range(usage.shape[0]):
        used = codes[:, level].long()
        equal(usage[level], torch.bincount(used[used >= 0], minlength=size), f"usage of level {level}")


def check_residual_peer(case, inputs, codes):
    check_levels(inputs["latents"], inputs["codebooks"], codes, loose=True)


def work_residual(case, inputs):
    M, L, V, d, size = case["M"], case["L"], case["V"], case["d"], case.dtype.itemsize
    least = Work(2.0 * L * M * V * d, (2 * M + L * V) * d * size + 4 * M * L + 8 * L * V)
    if case.direction == BACKWARD:
        return Work(least.flops + 4.0 * L * M * d, least.bytes + (3 * M + L * V) * d * size + 4 * M * L)
    return least


def _forward_float32(case):
    if case.direction != FORWARD:
        return "forward only"
    return None if case.dtype == torch.float32 else "takes float32"


def _forward_only(case):
    return None if case.direction == FORWARD else "forward only"


def _residual_vq(case, inputs):
    from vector_quantize_pytorch import ResidualVQ

    layer = ResidualVQ(dim=case["d"], num_quantizers=case["L"], codebook_size=case["V"])
    layer = layer.eval().to(inputs["latents"].device)
    for own, book in zip(layer.layers, inputs["codebooks"]):
        own._codebook.embed.data.copy_(book[None])
    rows = inputs["latents"][None]
    return lambda: layer(rows)


def _addmm_levels(case, inputs):
    latents, codebooks = inputs["latents"], inputs["codebooks"]
    norms = codebooks.square().sum(-1) / 2
    parts = blocks(case["M"], case["V"])

    def call():
        residual, codes = latents, []
        for book, offset in zip(codebooks, norms):
            code = torch.cat([torch.addmm(offset, residual[p], book.T, alpha=-1).argmin(1) for p in parts])
            residual = residual - book[code]
            codes.append(code)
        return torch.stack(codes, 1), latents - residual

    return call


def _mm_levels(case, inputs):
    latents, codebooks = inputs["latents"], inputs["codebooks"]
    parts = blocks(case["M"], case["V"])
    out = latents.new_empty(parts[0].stop, case["V"])

    def call():
        for book in codebooks:
            for part in parts:
                torch.mm(latents[part], book.T, out=out[: part.stop - part.start])

    return call


RESIDUAL_PEERS = (
    Peer(
        "vector-quantize-pytorch",
        _residual_vq,
        lambda found: found[1][0],
        "vector_quantize_pytorch",
        "vector-quantize-pytorch",
        refuses=_forward_only,
        note="ResidualVQ in eval mode, its codebooks overwritten",
    ),
    Peer(
        "addmm+argmin by level",
        _addmm_levels,
        lambda found: found[0],
        refuses=_forward_float32,
        note="in blocks of rows, norms made beforehand; codes and their sum, no losses or usage",
    ),
    Peer(
        "mm in blocks",
        _mm_levels,
        kind="mark",
        refuses=_forward_only,
        note="one bare product per level, in blocks of rows whose result stays in cache",
    ),
)

RESIDUAL = Op(
    "residual_quantize",
    _residual_cases(),
    make_residual,
    lambda inputs: inputs["latents"],
    run_residual,
    check_residual,
    work_residual,
    check_residual_peer,
    RESIDUAL_PEERS,
    flops_of_reference=3.0,
)


# --- fused with halting and projection

LEAVES = ("hidden", "mass", "end_weight", "mean_weight", "codebooks")


def _ragged_cases():
    found: dict[str, Case] = {}

    def add(B, S, D, d, L, V, smallest, direction=FORWARD, dtype=torch.float32, devices=("cpu", "cuda")):
        shape = {"B": B, "S": S, "D": D, "d": d, "L": L, "V": V}
        case = Case("quantize_ragged", shape, dtype, direction, smallest, devices)
        found.setdefault(case.key, case)

    add(3, 9, 8, 5, 2, 11, "tiny")
    add(3, 9, 8, 5, 2, 11, "tiny", BACKWARD)
    add(16, 256, 256, 128, 4, 1024, "quick")  # ztok-mini
    add(16, 256, 576, 96, 4, 4096, "default")  # the codec on SmolLM2
    add(16, 256, 576, 96, 4, 4096, "default", BACKWARD)
    add(1, 64, 576, 96, 4, 4096, "default")
    add(16, 256, 1024, 128, 4, 4096, "full")
    for direction in (FORWARD, BACKWARD):
        add(64, 1024, 1024, 128, 4, 4096, "default", direction, torch.bfloat16, ("cuda",))
        add(64, 1024, 576, 96, 4, 4096, "default", direction, devices=("cuda",))
    return tuple(found.values())


def make_ragged(case, device, generator):
    B, D, d = case["B"], case["D"], case["d"]
    lengths = mixed_lengths(B, case["S"], generator)
    T = sum(lengths)
    inputs = {
        "hidden": randn(generator, T, D, dtype=case.dtype),
        "mass": some_mass(T, generator),
        "cu_seqlens": offsets(lengths, device),
        "end_weight": randn(generator, d, D, scale=D**-0.5, dtype=case.dtype),
        "mean_weight": randn(generator, d, D, scale=D**-0.5, dtype=case.dtype),
        "codebooks": (
            randn(generator, case["L"], case["V"], d) * 0.6 ** torch.arange(case["L"], device=device)[:, None, None]
        ).to(case.dtype),
    }
    _, _, _, _, cu_units = halting_reference.halting_units(inputs["mass"], inputs["cu_seqlens"], 1.0, "fire")
    inputs["total_units"] = int(cu_units[-1])
    if case.direction == BACKWARD:
        inputs["grad"] = randn(generator, inputs["total_units"], d)
        for name in LEAVES:
            inputs[name].requires_grad_()
    return inputs


def _arguments(inputs):
    return [inputs[name] for name in ("hidden", "mass", "cu_seqlens", "end_weight", "mean_weight", "codebooks")]


def run_ragged(case, inputs):
    result = ops.quantize_ragged(*_arguments(inputs), total_units=inputs["total_units"])
    return result, _ragged_gradients(case, inputs, result)


def _ragged_gradients(case, inputs, result):
    if case.direction == FORWARD:
        return ()
    one = torch.ones_like(result.commitment)
    outputs = [result.quantized, result.commitment, result.codebook_loss]
    return with_gradients(outputs, [inputs[name] for name in LEAVES], [inputs["grad"], one, one])


def check_ragged(case, inputs, found):
    result, grads = found
    exact = {k: v.detach().double().requires_grad_() if k in LEAVES else v for k, v in inputs.items()}
    with torch.enable_grad():
        units, latents = _exact_latents(exact)
        outputs = given_codes(latents, exact["codebooks"], result.codes)
    for name in ("ends", "unit", "counts", "cu_units"):
        equal(getattr(result.units, name), getattr(units, name), f"units.{name}")
    close(result.units.weights, units.weights, torch.float32, what="units.weights")
    close(result.latents, latents, torch.float32, 5, "latents")  # sums of D terms, then divided by their own size
    # The search is held against the latents that were returned: their rounding may decide between two codes.
    total = check_levels(result.latents, inputs["codebooks"], result.codes)
    close(result.quantized, total, torch.float32, what="quantized")
    close(result.commitment, outputs[1], torch.float32, 5, "commitment")
    close(result.codebook_loss, outputs[2], torch.float32, 5, "codebook loss")
    _check_usage(result.codes, result.usage)
    if grads:
        one = torch.ones_like(outputs[1])
        expected = with_gradients(outputs, [exact[name] for name in LEAVES], [inputs["grad"].double(), one, one])
        for name, got, wanted in zip(LEAVES, grads, expected):
            # Sums over hundreds of units of either sign: what cancels is measured against the whole gradient's size.
            size = float(wanted.square().mean().sqrt())
            close(got / size, wanted / size, case.dtype, 20, f"gradient of {name}, divided by its root mean square")


def _exact_latents(exact):
    """Units and latents in float64, from the reference halting and integration; differentiable."""
    with ops.backend("reference"):
        units = ops.halting_units(exact["mass"], exact["cu_seqlens"])
        means = ops.integrate_units(exact["hidden"], units, exact["total_units"])
    latents = exact["hidden"][units.ends] @ exact["end_weight"].T + means @ exact["mean_weight"].T
    return units, latents * torch.rsqrt(latents.square().mean(1, keepdim=True) + reference.RMS_EPS)


def work_ragged(case, inputs):
    D, d, L, V, size = case["D"], case["d"], case["L"], case["V"], case.dtype.itemsize
    T, K = inputs["hidden"].shape[0], inputs["total_units"]
    flops = 4.0 * T * D + 4.0 * K * D * d + 2.0 * L * K * V * d
    moved = (T * D + 2 * d * D + L * V * d) * size + 4 * T + 8 * K * d + 4 * K * L + 8 * L * V + 13 * T
    if case.direction == BACKWARD:
        flops += 8.0 * T * D + 8.0 * K * D * d + 4.0 * L * K * d
        moved += (2 * T * D + 4 * d * D + 2 * L * V * d) * size + 8 * K * d + 8 * T
    return Work(flops, moved)


def _separate_ops(case, inputs):
    """The same from `halting_units`, `integrate_units`, two products and `residual_quantize`."""
    hidden, mass, cu_seqlens, end_weight, mean_weight, codebooks = _arguments(inputs)

    def call():
        units = ops.halting_units(mass, cu_seqlens)
        means = ops.integrate_units(hidden, units, inputs["total_units"])
        ends = hidden[units.ends]  # synchronises on CUDA: how many there are depends on the data
        latents = (ends @ end_weight.T + means @ mean_weight.T).float()
        latents = latents * torch.rsqrt(latents.square().mean(1, keepdim=True) + reference.RMS_EPS)
        result = ops.residual_quantize(latents, codebooks)
        return result, _ragged_gradients(case, inputs, result)

    return call


def _padded_python(case, inputs):
    """What is written first: integrate and fire by a loop over the sequences, then ResidualVQ."""
    from vector_quantize_pytorch import ResidualVQ

    hidden, mass, cu_seqlens, end_weight, mean_weight, codebooks = _arguments(inputs)
    layer = ResidualVQ(dim=case["d"], num_quantizers=case["L"], codebook_size=case["V"]).eval().to(hidden.device)
    for own, book in zip(layer.layers, codebooks):
        own._codebook.embed.data.copy_(book[None])
    starts = cu_seqlens.tolist()

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


def check_ragged_peer(case, inputs, found):
    """A peer need not tie the units to 2⁻²⁰ of the threshold: only the share of units with its codes is looked at."""
    codes = found
    if codes.shape != (inputs["total_units"], case["L"]):
        raise Mismatch(f"codes: expected {[inputs['total_units'], case['L']]}, got {list(codes.shape)}")
    with torch.no_grad(), ops.backend("reference"):
        expected = ops.quantize_ragged(*_arguments(inputs), total_units=inputs["total_units"]).codes
    agree = float((codes == expected).all(1).float().mean())
    if agree < 0.98:
        raise Mismatch(f"codes: {agree:.1%} of the units agree with the reference")


RAGGED_PEERS = (
    Peer(
        "separate ops",
        _separate_ops,
        lambda found: found[0].codes,
        kind="variant",
        refuses=lambda case: None if case.dtype == torch.float32 else "projects in the dtype of the hidden states",
        note="halting_units, integrate_units, two products and residual_quantize, each with its preferred backend",
    ),
    Peer(
        "loop + ResidualVQ",
        _padded_python,
        lambda found: found[1][0],
        "vector_quantize_pytorch",
        "vector-quantize-pytorch",
        refuses=_forward_float32,
        note="integrate and fire by a loop over sequences, then vector-quantize-pytorch in eval mode",
    ),
)

RAGGED = Op(
    "quantize_ragged",
    _ragged_cases(),
    make_ragged,
    lambda inputs: inputs["hidden"],
    run_ragged,
    check_ragged,
    work_ragged,
    check_ragged_peer,
    RAGGED_PEERS,
    flops_of_reference=3.0,
)
