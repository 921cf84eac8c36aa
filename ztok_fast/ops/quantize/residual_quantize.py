"""`residual_quantize`: residual quantisation of latents with straight-through gradients.

After VQ-VAE (van den Oord et al., arXiv:1711.00937); residual levels and their random dropout as in SoundStream
(Zeghidour et al., arXiv:2107.03312).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ztok_fast.ops import checks
from ztok_fast.ops.backends import UP_TO_FLOAT32, cpp, triton
from ztok_fast.ops.nearest.codebook_assign import check_codes
from ztok_fast.ops.nearest.reference import take_codes
from ztok_fast.ops.op import Op
from ztok_fast.ops.quantize import reference
from ztok_fast.ops.spec import BACKWARD, Case, CaseTable, Spec, Work, close, equal, randn


class ResidualCodes(NamedTuple):
    """Result of `residual_quantize` for M latents of width d and L codebooks of V entries.

    Attributes:
        codes: int32 [M, L], -1 where a level is dropped.
        quantized: [M, d] in the dtype of the latents, the sum of the chosen code vectors.
        commitment: scalar, gradient to the latents only.
        codebook_loss: scalar of the same value, gradient to the codebooks only.
        usage: int64 [L, V], how many rows chose each code; has no gradient.
    """

    codes: Tensor
    quantized: Tensor
    commitment: Tensor
    codebook_loss: Tensor
    usage: Tensor


def residual_quantize(latents: Tensor, codebooks: Tensor, levels: Tensor | None = None) -> ResidualCodes:
    """Quantise latents with L residual levels, each searched by squared distance.

    Codes are those of `codebook_assign(latents, codebooks, "l2")` as far as `levels` goes. `commitment` and
    `codebook_loss` are the mean over rows and used levels l of |z - q_{<=l}|^2 / d, with q_{<=l} the sum of the first
    l code vectors; float32 (float64 if an input is float64), 0 when no level of any row is used.

    The gradient of `quantized` passes straight through to the latents, except in rows that use no
    level (they are 0 and transmit nothing). A row with NaN or infinity gets code 0 at every used level and makes both
    losses NaN.

    O(M L V d) time; extra memory O(M d + L V d) at most, never of size M V. Backward O(M L d + L V d).

    Args:
        latents: floating point [M, d]; M may be 0.
        codebooks: floating point [L, V, d], finite and not empty.
        levels: int32 or int64 [M], residual levels used per row, in [0, L]; None uses all.

    Returns:
        `ResidualCodes`.

    Raises:
        ValueError: bad rank, dtype, device or width; codebooks that are empty or not finite; levels out of range.
    """
    given = checks.Arguments("residual_quantize")
    given.tensor("latents", latents, "[M, d]")
    given.tensor("codebooks", codebooks, "[L, V, d]", empty=False)
    if levels is not None:
        given.tensor("levels", levels, "[M]", checks.INDICES)
    quantized, commitment, codebook_loss, codes, usage = RESIDUAL_QUANTIZE(latents, codebooks, levels)
    return ResidualCodes(codes, quantized, commitment, codebook_loss, usage)


def check_level_values(op: str, levels: Tensor | None, num_levels: int) -> None:
    """Levels in [0, L]."""
    if levels is not None:
        expected = f"in [0, {num_levels}] (the number of codebooks)"
        checks.check_range_values(op, "levels", levels, 0, num_levels, expected)


def _check_values(latents: Tensor, codebooks: Tensor, levels: Tensor | None) -> None:
    checks.check_finite_values("residual_quantize", "codebooks", codebooks)
    check_level_values("residual_quantize", levels, codebooks.shape[0])


def fake_codes(latents: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors with the shapes and dtypes of quantized, commitment, codebook_loss, codes and usage."""
    num_levels, size, _ = codebooks.shape
    dtype = checks.compute_dtype(latents, codebooks)
    return (
        latents.new_empty(latents.shape),
        latents.new_empty((), dtype=dtype),
        latents.new_empty((), dtype=dtype),
        latents.new_empty((latents.shape[0], num_levels), dtype=torch.int32),
        latents.new_empty((num_levels, size), dtype=torch.int64),
    )


def _backward(args, outputs, grads, needs):
    latents, codebooks, _ = args
    return *RESIDUAL_QUANTIZE_BACKWARD(latents, codebooks, outputs[3], *grads[:3]), None


# --- specification


def make(sizes, dtype, generator):
    """Codebooks whose levels shrink as trained ones do, so that every level's residual is of its codes' size."""
    latents = randn(generator, sizes["M"], sizes["d"], dtype=dtype)
    books = some_codebooks(sizes, dtype, generator)
    return {"latents": latents, "codebooks": books, **some_levels(sizes, sizes["M"], generator)}


def some_codebooks(sizes, dtype, generator) -> Tensor:
    """`L` codebooks of `V` codes of width `d`, each level's codes shorter than the ones before."""
    shrink = 0.6 ** torch.arange(sizes["L"], device=generator.device)[:, None, None]
    return (randn(generator, sizes["L"], sizes["V"], sizes["d"]) * shrink).to(dtype)


def some_levels(sizes, count, generator) -> dict[str, Tensor]:
    """Where the sizes name a dtype of `levels`, so many of them."""
    if not sizes.get("levels"):
        return {}
    levels = torch.randint(0, sizes["L"] + 1, (count,), generator=generator, device=generator.device)
    return {"levels": levels.to(sizes["levels"])}


def check_levels_searched(latents, codebooks, codes, loose=False) -> Tensor:
    """Codes of all levels against the residual that the levels before leave; returns their sum.

    Raises:
        Mismatch: a code that is not the nearest.
    """
    dtype = checks.compute_dtype(latents, codebooks)
    residual = latents.detach().to(dtype)
    total = torch.zeros_like(residual)
    for level, book in enumerate(codebooks.detach().to(dtype)):
        used = codes[:, level] >= 0
        check_codes(residual[used], book, codes[used, level], loose=loose)
        chosen = take_codes(book, codes[:, level])
        residual = residual - chosen
        total = total + chosen
    return total


def check(inputs, result) -> None:
    """Codes, their sum, losses and usage of `ResidualCodes`."""
    latents, codebooks = inputs["latents"].detach(), inputs["codebooks"].detach()
    total = check_levels_searched(latents, codebooks, result.codes)
    close(result.quantized, total, latents.dtype, what="quantized")
    check_losses_and_usage(latents, codebooks, result, checks.compute_dtype(latents))


def check_losses_and_usage(latents, codebooks, result, dtype) -> None:
    """Both losses of the codes found, and how often each code was chosen."""
    exact = reference.quantized_and_losses(latents.double(), codebooks.double(), result.codes)
    for name, loss in zip(("commitment", "codebook_loss"), exact[1:]):
        close(getattr(result, name), loss, dtype, 5, name)
    for level, counts in enumerate(result.usage):
        used = result.codes[:, level].long()
        equal(counts, torch.bincount(used[used >= 0], minlength=len(counts)), f"usage of level {level}")


def _cases() -> tuple[Case, ...]:
    add = CaseTable("M", "L", "V", "d")
    add(19, 3, 31, 6, "tiny", both=True)
    add(256, 4, 1024, 128, "quick")
    for M in (1, 256, 4096):
        add(M, 4, 1024, 128, "default")  # ztok-mini
        add(M, 4, 4096, 96, "default" if M < 4096 else "full")  # the codec on SmolLM2
    add(256, 8, 1024, 64, "default")
    add(256, 4, 1024, 576, "default")
    add(1024, 4, 1024, 128, "default", direction=BACKWARD)
    for M in (4096, 65536):
        for V, d in ((1024, 128), (4096, 96), (4096, 1024)):
            add(M, 4, V, d, "default", dtype=torch.bfloat16, devices=("cuda",))
        add(M, 4, 4096, 96, "full")
    add(65536, 4, 1024, 128, "default", direction=BACKWARD, devices=("cuda",))
    return add.cases()


def _work(case, inputs):
    L, V, d, size, M = case["L"], case["V"], case["d"], case.dtype.itemsize, case["M"]
    least = Work(2.0 * L * M * V * d, (2 * M + L * V) * d * size + 4 * M * L + 8 * L * V)
    if case.direction == BACKWARD:
        return Work(least.flops + 4.0 * L * M * d, least.bytes + (3 * M + L * V) * d * size + 4 * M * L)
    return least


RESIDUAL_QUANTIZE = Op(
    "residual_quantize(Tensor latents, Tensor codebooks, Tensor? levels) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.residual_quantize,
    fake=lambda latents, codebooks, levels: fake_codes(latents, codebooks),
    backends=(cpp(UP_TO_FLOAT32, checks_values=True), triton("quantize.triton:residual_quantize")),
    backward=_backward,
    check_values=_check_values,
    spec=Spec(
        residual_quantize,
        make,
        samples=(
            {"M": 1, "L": 1, "V": 1, "d": 1},
            {"M": 0, "L": 2, "V": 5, "d": 8},
            {"M": 3, "L": 2, "V": 17, "d": 3, "levels": torch.int32},
            {"M": 37, "L": 3, "V": 100, "d": 17, "levels": torch.int64},
            {"M": 20, "L": 2, "V": 131, "d": 65},
        ),
        check=check,
        differentiable=("latents", "codebooks"),
        outputs=lambda result: (result.quantized, result.commitment, result.codebook_loss),
        tolerance=5,
        cases=_cases(),
        work=_work,
        flops_of_reference=3.0,
    ),
)

RESIDUAL_QUANTIZE_BACKWARD = Op(
    "residual_quantize_backward(Tensor latents, Tensor codebooks, Tensor codes, Tensor grad_quantized,"
    " Tensor grad_commitment, Tensor grad_codebook_loss) -> (Tensor, Tensor)",
    reference=reference.residual_quantize_backward,
    fake=lambda latents, codebooks, *_: (latents.new_empty(latents.shape), codebooks.new_empty(codebooks.shape)),
    backends=(cpp(UP_TO_FLOAT32), triton("quantize.triton:residual_quantize_backward")),
)
