"""Compile cases of the halting, integration and quantise kernels, with the tiles that their launchers give them."""

from dataclasses import replace

HALTING = "ztok_fast.ops.halting.triton_kernels"
INTEGRATION = "ztok_fast.ops.halting.triton_integration"
QUANTIZE = "ztok_fast.ops.quantize.triton_kernels"

POINTERS = {
    "mass": "*fp32", "sums": "*i64", "prefix": "*i64", "cu_seqlens": "*i64", "counts": "*i32", "cu_units": "*i32",
    "weights": "*fp32", "ends": "*i1", "unit": "*i32", "first_rows": "*i64", "end_rows": "*i64",
    "weight_grads": "*fp32", "tails": "*fp64", "grad": "*fp32", "inverse": "*fp32", "grad_weights": "*fp32",
    "grad_end_rows": "*fp32", "levels": "*i32", "latents": "*fp32", "scales": "*fp32", "unit_levels": "*i32",
    "grad_latents": "*fp32", "from_codes": "*fp32",
}  # fmt: skip
NUMBERS = {name: "i32" for name in ("T", "B", "L", "M", "total_units")} | {"bits": "i64"}


def signature(names, **types):
    """Types of the named arguments: those given, else the usual ones."""
    return {name: {**POINTERS, **NUMBERS, **types}[name] for name in names.split()}


# the others are left to the slow tests
QUICK = {"halting-rows-fire-bf16", "mass-gradient-fire-bf16", "unit-means-bf16", "row-gradients-bf16", "project-units-fp32-96"}


def unit_cases(case):
    """All cases; `case` is the class `Case`."""
    return [replace(c, slow=c.name not in QUICK) for c in _cases(case)]


def _cases(case):
    from ztok_fast.ops.halting import triton as halting
    from ztok_fast.ops.quantize import triton as quantize

    tile = {"BT": halting.TILE}
    later = {"BT": 512}
    for stop, dtype in ((False, "*bf16"), (True, "*fp32"), (False, "*fp64")):
        mode = f"{'stop' if stop else 'fire'}-{dtype[1:]}"
        shares = "*fp64" if dtype == "*fp64" else "*fp32"
        of_mass = {"mass": dtype, "weights": shares, "weight_grads": shares, "grad": dtype}
        yield case(
            f"tile-sums-{mode}", f"{HALTING}:tile_sums_kernel", signature("mass sums T bits", **of_mass),
            {"STOP": stop, **tile},
        )  # fmt: skip
        yield case(
            f"prefix-{mode}", f"{HALTING}:prefix_kernel", signature("mass sums prefix T bits", **of_mass),
            {"STOP": stop, **tile, "BS": halting.SUMS},
        )  # fmt: skip
        yield case(
            f"unit-offsets-{mode}", f"{HALTING}:offsets_kernel", signature("prefix cu_seqlens counts cu_units B"),
            {"STOP": stop, "BB": halting.TILE},
        )  # fmt: skip
        yield case(
            f"halting-rows-{mode}", f"{HALTING}:rows_kernel",
            signature(
                "mass prefix cu_seqlens cu_units weights ends unit first_rows end_rows T B total_units bits", **of_mass
            ),
            {"STOP": stop, "TABLE": True, **tile},
        )  # fmt: skip
        yield case(
            f"mass-gradient-{mode}", f"{HALTING}:mass_gradient_kernel",
            signature("weight_grads prefix cu_seqlens tails grad T B", **of_mass),
            {"STOP": stop, **later, "BS": halting.SUMS},
        )  # fmt: skip
    yield case(
        "tails", f"{HALTING}:tails_kernel", signature("weight_grads prefix cu_seqlens tails T B", cu_seqlens="*i32"), later
    )
    yield case(
        "unit-rows", f"{INTEGRATION}:unit_rows_kernel",
        signature("unit ends cu_units first_rows end_rows T B total_units"), tile,
    )  # fmt: skip
    yield case(
        "unit-totals", f"{INTEGRATION}:unit_totals_kernel",
        signature("weights first_rows end_rows cu_units inverse B total_units"),
        {"WIDE": False, "BU": halting.UNITS, "BR": halting.ROWS},
    )  # fmt: skip
    for dtype, wide, width in (("*bf16", False, 576), ("*fp32", False, 64), ("*fp64", True, 576)):
        shares = "*fp64" if wide else "*fp32"
        types = {
            "rows": dtype, "means": dtype, "grad": dtype, "grad_rows": dtype, "weights": shares, "inverse": shares,
            "grad_weights": shares,
        }  # fmt: skip
        columns = min(halting.MEAN_COLUMNS, 1 << (width - 1).bit_length())
        yield case(
            f"unit-means-{dtype[1:]}", f"{INTEGRATION}:unit_means_kernel",
            signature("rows weights first_rows end_rows cu_units means B total_units", **types),
            {"D": width, "WIDE": wide, "BR": halting.MEAN_ROWS, "BC": columns}, 4 if columns > 128 else 1,
        )  # fmt: skip
        yield case(
            f"row-gradients-{dtype[1:]}", f"{INTEGRATION}:row_gradients_kernel",
            signature(
                "rows weights unit ends first_rows cu_units inverse means grad grad_end_rows grad_rows grad_weights "
                "T B total_units", **types
            ),
            {
                "D": width, "WIDE": wide, "END_ROWS": not wide, "BR": halting.GRADIENT_ROWS,
                "BC": min(halting.WIDE_GRADIENT_COLUMNS if wide else halting.GRADIENT_COLUMNS, columns),
            },
        )  # fmt: skip
    for dtype, width in (("*bf16", 96), ("*fp32", 96), ("*fp32", 1024)):
        columns = min(quantize.PROJECT_WIDTH, 1 << (width - 1).bit_length())
        yield case(
            f"project-units-{dtype[1:]}-{width}", f"{QUANTIZE}:project_units_kernel",
            signature(
                "hidden weights first_rows end_rows cu_units end_weight mean_weight levels latents scales unit_levels "
                "B L total_units", hidden=dtype, end_weight=dtype, mean_weight=dtype
            ),
            {
                "HIDDEN": 576, "D": width, "LEVELS": True, "WHOLE": columns >= width, "BM": quantize.PROJECT_UNITS,
                "BN": columns, "BK": quantize.PROJECT_STEP,
            },
            quantize.PROJECT_WARPS, 2,
        )  # fmt: skip
    block = quantize.row_block(1024)
    yield case(
        "unnormalise", f"{QUANTIZE}:unnormalise_kernel", signature("latents scales grad_latents from_codes grad M"),
        {"D": 1024, **block}, quantize.ROW_WARPS,
    )  # fmt: skip
    yield case(
        "normalise", f"{QUANTIZE}:normalise_kernel", signature("latents scales M"),
        {"D": 1024, **block}, quantize.ROW_WARPS,
    )  # fmt: skip
