"""`quantize_ragged`: residual quantisation of units, fused with their integration and projection."""

from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import UP_TO_FLOAT32, cpp, triton
from ztok_fast.ops.halting import reference as halting_reference
from ztok_fast.ops.halting.halting_units import HaltingUnits, check_units_found, halting_units, some_mass
from ztok_fast.ops.halting.integrate_units import check_unit_values, check_units
from ztok_fast.ops.op import Op
from ztok_fast.ops.quantize import reference
from ztok_fast.ops.quantize.residual_quantize import (
    check_level_values,
    check_levels_searched,
    check_losses_and_usage,
    fake_codes,
    some_codebooks,
    some_levels,
)
from ztok_fast.ops.spec import BACKWARD, Case, CaseTable, Spec, Work, close, lengths_of, offsets, randn

_NAME = "quantize_ragged"


class QuantizedUnits(NamedTuple):
    """Result of `quantize_ragged` for K units of width d and L codebooks of V entries.

    Attributes:
        codes, quantized, commitment, codebook_loss, usage: as in `ResidualCodes`, a row per unit.
        latents: float32 (float64 if a float input other than the mass is) [K, d], what was quantised; differentiable.
        units: the `HaltingUnits`, those given or those of the mass.
    """

    codes: Tensor
    quantized: Tensor
    latents: Tensor
    commitment: Tensor
    codebook_loss: Tensor
    usage: Tensor
    units: HaltingUnits


def quantize_ragged(
    hidden: Tensor,
    mass: Tensor | None,
    cu_seqlens: Tensor | None,
    end_weight: Tensor,
    mean_weight: Tensor,
    codebooks: Tensor,
    levels: Tensor | None = None,
    threshold: float = 1.0,
    mode: str = "fire",
    total_units: int | None = None,
    units: HaltingUnits | None = None,
) -> QuantizedUnits:
    """From packed hidden states to packed codes: halting, integration, projection, residual search.

    The latent of a unit is end_weight @ h + mean_weight @ m, divided by its root mean square, with h the hidden state
    of the row that ends the unit and m the weighted mean of the unit's rows (`integrate_units`). Halting is that of
    `halting_units`, quantisation that of `residual_quantize`; so are the gradients, that of the mass by way of
    `units.weights`.

    For K units O(T D + K D d + K L V d) time, so that rows which end no unit cost their part of a mean and no more;
    extra memory O(T + K (D + d) + L V d) at most. Backward O(T D + K D d + K L d + L V d).

    Args:
        hidden: floating point [T, D].
        mass, cu_seqlens: the halting mass [T] and the offsets int32 or int64 [B + 1], see `halting_units`; both None
            with `units`.
        end_weight, mean_weight: floating point [d, D].
        codebooks: floating point [L, V, d], finite and not empty.
        levels: int32 or int64 [B], residual levels used per sequence, in [0, L]; None uses all.
        threshold, mode: see `halting_units`; not looked at with `units`.
        total_units: rows of the result, at least the number of units; T is always enough. Rows past the last unit
            have codes -1 and zeros elsewhere, and count in no loss and no usage. None means exactly the number of
            units, which is read from the device: that synchronises, and cannot be inside a compiled full graph.
        units: units of the T rows that were found before, so that they are not found again; their weights may be
            others than those of `halting_units` and receive gradients.

    Returns:
        `QuantizedUnits`, computed in float32 (float64 if a float input other than the mass is float64).

    Raises:
        ValueError: as `halting_units` and `residual_quantize`; widths that do not match; too few `total_units`; both
            a mass and units.
    """
    given = checks.Arguments(_NAME)
    given.tensor("hidden", hidden, "[T, D]")
    given.tensor("end_weight", end_weight, "[d, D]")
    given.tensor("codebooks", codebooks, "[L, V, d]", empty=False)
    given.tensor("mean_weight", mean_weight, "[d, D]")
    if units is None:
        if mass is None or cu_seqlens is None:
            checks.fail(_NAME, "units", "given where mass or cu_seqlens is not", "None")
        given.tensor("mass", mass, "[T]")
        given.tensor("cu_seqlens", cu_seqlens, "[B + 1]", checks.INDICES)
        units = halting_units(mass, cu_seqlens, threshold, mode)
    else:
        for argument, value in (("mass", mass), ("cu_seqlens", cu_seqlens)):
            if value is not None:
                checks.fail(_NAME, argument, "None where units are given", checks.describe(value))
        check_units(given, units)
    if levels is not None:
        given.tensor("levels", levels, "[B]", checks.INDICES)
    if total_units is None:
        total_units = int(units.cu_units[-1])
    checks.check_count(_NAME, "total_units", total_units)
    quantized, latents, commitment, codebook_loss, _, codes, usage = QUANTIZE_RAGGED(
        hidden, units.weights, units.unit, units.ends, units.cu_units, end_weight, mean_weight, codebooks, levels,
        total_units,
    )  # fmt: skip
    return QuantizedUnits(codes, quantized, latents, commitment, codebook_loss, usage, units)


def _check_values(
    hidden, weights, unit, ends, cu_units, end_weight, mean_weight, codebooks, levels, total_units
) -> None:  # fmt: skip
    checks.check_finite_values(_NAME, "codebooks", codebooks)
    check_level_values(_NAME, levels, codebooks.shape[0])
    check_unit_values(_NAME, cu_units, total_units)


def _fake(hidden, weights, unit, ends, cu_units, end_weight, mean_weight, codebooks, levels, total_units):
    dtype = checks.compute_dtype(hidden, end_weight, mean_weight, codebooks)
    latents = hidden.new_empty((total_units, codebooks.shape[2]), dtype=dtype)
    quantized, commitment, codebook_loss, codes, usage = fake_codes(latents, codebooks)
    return quantized, latents, commitment, codebook_loss, latents.new_empty(total_units), codes, usage


def _backward(args, outputs, grads, needs):
    _, latents, _, _, scale, codes, _ = outputs
    hidden, weights, *projections = QUANTIZE_RAGGED_BACKWARD(*args[:8], latents, scale, codes, *grads[:4])
    return hidden, weights, None, None, None, *projections, None, None


# --- specification

DIFFERENTIABLE = ("hidden", "mass", "end_weight", "mean_weight", "codebooks")


def make(sizes, dtype, generator):
    """`L` codebooks of `V` codes of width `d`, hidden states of width `D`; sequences as `halting_units.make` says.

    `spare`: rows past the last unit; `levels`: dtype of residual levels per sequence.
    """
    D, d = sizes["D"], sizes["d"]
    lengths, mode = lengths_of(sizes, generator), sizes.get("mode", "fire")
    T = sum(lengths)
    inputs = {
        "hidden": randn(generator, T, D, dtype=dtype),
        "mass": some_mass(T, torch.promote_types(dtype, torch.float32), generator, sizes),
        "cu_seqlens": offsets(lengths, generator.device),
        "end_weight": randn(generator, d, D, scale=D**-0.5, dtype=dtype),
        "mean_weight": randn(generator, d, D, scale=D**-0.5, dtype=dtype),
        "codebooks": some_codebooks(sizes, dtype, generator),
        "mode": mode,
    }
    cu_units = halting_reference.halting_units(inputs["mass"], inputs["cu_seqlens"], 1.0, mode)[4]
    inputs["total_units"] = int(cu_units[-1]) + sizes.get("spare", 0)
    return inputs | some_levels(sizes, len(lengths), generator)


def check(inputs, result) -> None:
    """Units and latents against the reference in float64; the search against the latents that were returned, whose
    rounding may decide between two codes."""
    hidden, mass, end_weight, mean_weight, codebooks = (inputs[name].detach() for name in DIFFERENTIABLE)
    units, dtype = result.units, checks.compute_dtype(hidden, codebooks)
    check_units_found(units, mass, inputs["cu_seqlens"], inputs.get("threshold", 1.0), inputs["mode"])
    exact = reference.quantize_ragged(
        hidden.double(), units.weights.detach().double(), units.unit, units.ends, units.cu_units,
        end_weight.double(), mean_weight.double(), codebooks.double(), inputs.get("levels"), inputs["total_units"],
    )  # fmt: skip
    # sums of D terms, then divided by their own size
    close(result.latents, exact[1], dtype, 20, "latents")
    total = check_levels_searched(result.latents, codebooks, result.codes)
    close(result.quantized, total, dtype, what="quantized")
    check_losses_and_usage(result.latents.detach(), codebooks, result, dtype)


def _cases() -> tuple[Case, ...]:
    add = CaseTable("B", "S", "D", "d", "L", "V")
    add(3, 9, 8, 5, 2, 11, "tiny", both=True)
    add(16, 256, 256, 128, 4, 1024, "quick")  # ztok-mini
    add(16, 256, 576, 96, 4, 4096, "default")  # the codec on SmolLM2
    add(16, 256, 576, 96, 4, 4096, "default", direction=BACKWARD)
    add(1, 64, 576, 96, 4, 4096, "default")
    add(16, 256, 1024, 128, 4, 4096, "full")
    add(64, 1024, 1024, 128, 4, 4096, "default", both=True, dtype=torch.bfloat16, devices=("cuda",))
    add(64, 1024, 576, 96, 4, 4096, "default", both=True, devices=("cuda",))
    return add.cases()


def _work(case, inputs):
    D, d, L, V, size = case["D"], case["d"], case["L"], case["V"], case.dtype.itemsize
    T, K = inputs["hidden"].shape[0], inputs["total_units"]
    flops = 4.0 * T * D + 4.0 * K * D * d + 2.0 * L * K * V * d
    moved = (T * D + 2 * d * D + L * V * d) * size + 4 * T + 8 * K * d + 4 * K * L + 8 * L * V + 13 * T
    if case.direction == BACKWARD:
        flops += 8.0 * T * D + 8.0 * K * D * d + 4.0 * L * K * d
        moved += (2 * T * D + 4 * d * D + 2 * L * V * d) * size + 8 * K * d + 8 * T
    return Work(flops, moved)


QUANTIZE_RAGGED = Op(
    "quantize_ragged(Tensor hidden, Tensor weights, Tensor unit, Tensor ends, Tensor cu_units, Tensor end_weight,"
    " Tensor mean_weight, Tensor codebooks, Tensor? levels, SymInt total_units)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.quantize_ragged,
    fake=_fake,
    backends=(cpp(UP_TO_FLOAT32, checks_values=True), triton("quantize.triton:quantize_ragged")),
    backward=_backward,
    check_values=_check_values,
    spec=Spec(
        quantize_ragged,
        make,
        samples=(
            {"lengths": (5, 0, 1, 7), "D": 6, "d": 3, "L": 2, "V": 7, "spare": 3, "levels": torch.int32},
            {"lengths": (5, 9), "D": 6, "d": 3, "L": 2, "V": 7},
            {"lengths": (5, 0, 9, 2), "D": 17, "d": 5, "L": 3, "V": 11, "mode": "stop", "levels": torch.int64},
            {"lengths": (), "D": 4, "d": 3, "L": 1, "V": 5, "spare": 2},
            {"lengths": (0, 0), "D": 4, "d": 3, "L": 2, "V": 5},
            {"lengths": (33, 1, 5), "D": 37, "d": 20, "L": 3, "V": 13, "mass": 1.0},
            {"lengths": (5, 0, 30), "D": 65, "d": 33, "L": 1, "V": 40, "mass": 0.0},
            {"lengths": (3, 4), "D": 9, "d": 130, "L": 1, "V": 6},  # latents wider than a tile of the projection
        ),
        check=check,
        differentiable=DIFFERENTIABLE,
        outputs=lambda result: (result.quantized, result.latents, result.commitment, result.codebook_loss),
        # sums over rows of products with the factors that normalise the latents
        tolerance=20,
        cases=_cases(),
        work=_work,
        flops_of_reference=3.0,
    ),
)

QUANTIZE_RAGGED_BACKWARD = Op(
    "quantize_ragged_backward(Tensor hidden, Tensor weights, Tensor unit, Tensor ends, Tensor cu_units,"
    " Tensor end_weight, Tensor mean_weight, Tensor codebooks, Tensor latents, Tensor scale, Tensor codes,"
    " Tensor grad_quantized, Tensor grad_latents, Tensor grad_commitment, Tensor grad_codebook_loss)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.quantize_ragged_backward,
    fake=lambda hidden, weights, unit, ends, cu_units, end_weight, mean_weight, codebooks, *_: tuple(
        t.new_empty(t.shape) for t in (hidden, weights, end_weight, mean_weight, codebooks)
    ),
    backends=(cpp(UP_TO_FLOAT32), triton("quantize.triton:quantize_ragged_backward")),
)
