"""Compile cases of the halting, integration and quantise kernels, from the tables' entries."""

from tests.ops.aot_case import ANY, Case, capability_of, text_of

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
NUMBERS = dict.fromkeys(("T", "B", "L", "M", "total_units"), "i32") | {"bits": "i64"}
# whether the mode is "stop", and the dtype of the mass
MODES = ((False, "*bf16"), (True, "*fp32"), (False, "*fp64"))


def signature(names, **types):
    """Types of the named arguments: those given, else the usual ones."""
    return {name: {**POINTERS, **NUMBERS, **types}[name] for name in names.split()}


def _modes():
    for stop, dtype in MODES:
        shares = "*fp64" if dtype == "*fp64" else "*fp32"
        types = {"mass": dtype, "weights": shares, "weight_grads": shares, "grad": dtype}
        yield f"{'stop' if stop else 'fire'}-{dtype[1:]}", stop, types


def scan(arch, key, tile):
    """The kernels over tiles of rows."""
    name, launch = f"{text_of(key)}-{arch}", {"num_warps": tile.warps, "capabilities": (capability_of(arch),)}
    for mode, stop, types in _modes():
        yield Case(
            f"tile-sums-{mode}-{name}", f"{HALTING}:tile_sums_kernel", signature("mass sums T bits", **types),
            {"STOP": stop, "BT": tile.rows}, **launch,
        )  # fmt: skip
        yield Case(
            f"prefix-{mode}-{name}", f"{HALTING}:prefix_kernel", signature("mass sums prefix T bits", **types),
            {"STOP": stop, "BT": tile.rows, "BS": tile.sums}, **launch,
        )  # fmt: skip
        yield Case(
            f"halting-rows-{mode}-{name}", f"{HALTING}:rows_kernel",
            signature(
                "mass prefix cu_seqlens cu_units weights ends unit first_rows end_rows T B total_units bits", **types
            ),
            {"STOP": stop, "TABLE": True, "BT": tile.rows}, **launch,
        )  # fmt: skip
    yield Case(
        f"unit-rows-{name}", f"{INTEGRATION}:unit_rows_kernel",
        signature("unit ends cu_units first_rows end_rows T B total_units"), {"BT": tile.rows}, **launch,
    )  # fmt: skip


def later(arch, key, tile):
    """The backward scan."""
    name, launch = f"{text_of(key)}-{arch}", {"num_warps": tile.warps, "capabilities": (capability_of(arch),)}
    for mode, stop, types in _modes():
        yield Case(
            f"mass-gradient-{mode}-{name}", f"{HALTING}:mass_gradient_kernel",
            signature("weight_grads prefix cu_seqlens tails grad T B", **types),
            {"STOP": stop, "BT": tile.rows, "BS": tile.sums}, **launch,
        )  # fmt: skip
    yield Case(
        f"tails-{name}", f"{HALTING}:tails_kernel",
        signature("weight_grads prefix cu_seqlens tails T B", cu_seqlens="*i32"), {"BT": tile.rows}, **launch,
    )  # fmt: skip


def offsets(arch, key, block):
    """`offsets_kernel` in both modes."""
    for stop in (False, True):
        yield Case(
            f"unit-offsets-{'stop' if stop else 'fire'}-{text_of(key)}-{arch}", f"{HALTING}:offsets_kernel",
            signature("prefix cu_seqlens counts cu_units B"), {"STOP": stop, "BB": block.sequences}, block.warps,
            capabilities=(capability_of(arch),),
        )  # fmt: skip


def totals(arch, key, block):
    """`unit_totals_kernel`."""
    for wide in (False, True):
        shares = "*fp64" if wide else "*fp32"
        yield Case(
            f"unit-totals-{shares[1:]}-{text_of(key)}-{arch}", f"{INTEGRATION}:unit_totals_kernel",
            signature("weights first_rows end_rows cu_units inverse B total_units", weights=shares, inverse=shares),
            {"WIDE": wide, "BU": block.units, "BR": block.rows}, block.warps, capabilities=(capability_of(arch),),
        )  # fmt: skip


def _types(dtype):
    shares = "*fp64" if dtype == "*fp64" else "*fp32"
    return {
        "rows": dtype, "means": dtype, "grad": dtype, "grad_rows": dtype, "weights": shares, "inverse": shares,
        "grad_weights": shares,
    }  # fmt: skip


def means(arch, key, tile):
    """`unit_means_kernel`."""
    width = 576 if key[0] == ANY else key[0]
    for dtype in ("*fp64",) if key[1] else ("*bf16", "*fp32"):
        yield Case(
            f"unit-means-{dtype[1:]}-{text_of(key)}-{arch}", f"{INTEGRATION}:unit_means_kernel",
            signature("rows weights first_rows end_rows cu_units means B total_units", **_types(dtype)),
            {"D": width, "WIDE": key[1], "BR": tile.rows, "BC": tile.columns}, tile.warps,
            capabilities=(capability_of(arch),),
        )  # fmt: skip


def gradients(arch, key, tile):
    """`row_gradients_kernel` of integration."""
    for dtype in ("*fp64",) if key[1] else ("*bf16", "*fp32"):
        yield Case(
            f"unit-row-gradients-{dtype[1:]}-{text_of(key)}-{arch}", f"{INTEGRATION}:row_gradients_kernel",
            signature(
                "rows weights unit ends first_rows cu_units inverse means grad grad_end_rows grad_rows grad_weights "
                "T B total_units", **_types(dtype)
            ),
            {"D": 576, "WIDE": key[1], "END_ROWS": not key[1], "BR": tile.rows, "BC": tile.columns}, tile.warps,
            capabilities=(capability_of(arch),),
        )  # fmt: skip


def project(arch, key, tile):
    """`project_units_kernel`: latents as wide as the bound, or wider than a tile."""
    for dtype in ("*bf16", "*fp32"):
        for width in (96, 1024) if key[0] == ANY else (key[0],):
            columns = min(tile.columns, 1 << (width - 1).bit_length())
            yield Case(
                f"project-units-{dtype[1:]}-{width}-{text_of(key)}-{arch}", f"{QUANTIZE}:project_units_kernel",
                signature(
                    "hidden weights first_rows end_rows cu_units end_weight mean_weight levels latents scales "
                    "unit_levels B L total_units", hidden=dtype, end_weight=dtype, mean_weight=dtype
                ),
                {
                    "HIDDEN": 576, "D": width, "LEVELS": True, "WHOLE": columns >= width, "BM": tile.units,
                    "BN": columns, "BK": tile.width,
                },
                tile.warps, tile.stages, capabilities=(capability_of(arch),),
            )  # fmt: skip


def rows(arch, key, tile):
    """Normalisation and its backward pass; 4096 stands for the widest latents."""
    width = 4096 if key[0] == ANY else key[0]
    block = {"D": width, "BM": tile.rows, "BD": width}
    launch = {"num_warps": tile.warps, "capabilities": (capability_of(arch),)}
    yield Case(
        f"normalise-{text_of(key)}-{arch}", f"{QUANTIZE}:normalise_kernel", signature("latents scales M"), block,
        **launch,
    )  # fmt: skip
    yield Case(
        f"unnormalise-{text_of(key)}-{arch}", f"{QUANTIZE}:unnormalise_kernel",
        signature("latents scales grad_latents from_codes grad M"), block, **launch,
    )  # fmt: skip


HALTING_TABLES = {
    "SCAN": scan, "LATER": later, "OFFSETS": offsets, "TOTALS": totals, "MEANS": means, "GRADIENTS": gradients,
}  # fmt: skip
QUANTIZE_TABLES = {"PROJECT": project, "ROWS": rows}
QUICK = (
    "halting-rows-fire-bf16-any-sm_90", "mass-gradient-fire-bf16-any-sm_100", "unit-means-bf16-any-false-sm_80",
    "unit-row-gradients-bf16-any-false-sm_100", "project-units-fp32-96-any-sm_90", "unnormalise-any-sm_80",
)  # fmt: skip
