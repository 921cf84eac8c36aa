"""Compile cases of the nearest-code and residual search and of their backward passes, from the tables' entries."""

from tests.ops.aot_case import ANY, Case, capability_of, text_of

SEARCH = "ztok_fast.ops.nearest.triton_kernels"
GRADIENT = "ztok_fast.ops.nearest.triton_gradients"
# (row terms, code terms) -> types of rows and codebook
TYPES = {(1, 1): ("*bf16", "*bf16"), (2, 1): ("*fp32", "*bf16"), (2, 2): ("*fp32", "*fp32")}
METRICS = ("l2", "cosine", "dot")
OUTPUTS = {"residual": "*fp32", "codes": "*i32", "distances": "*fp32", "usage": "*i64", "sums": "*fp64"}
SIZES = {"M": "i32", "V": "i32", "L": "i32"}
# the width that stands for all those without a bound
WIDE = 1024


def _options(arch, tile):
    return {
        "num_warps": tile.warps, "num_stages": tile.stages, "capabilities": (capability_of(arch),),
        "sm90_needs": ("wgmma",),
    }  # fmt: skip


def steps(arch, key, tile):
    """`scan_kernel`."""
    rows, _ = TYPES[key[1:]]
    for width in (64, WIDE):
        yield Case(
            f"scan-{width}-{text_of(key)}-{arch}", f"{SEARCH}:scan_kernel",
            {
                "x": rows, "terms": "*bf16", "low_terms": "*bf16", "offsets": "*fp32", "row_levels": "*i32",
                "scores": "*fp32", "indices": "*i32", "M": "i32", "V": "i32", "tiles": "i32", "level": "i32",
            },
            {
                "D": width, "METRIC": "l2", "ROW_TERMS": key[1], "CODE_TERMS": key[2], "UPCAST": False, "LEVELS": True,
                "BM": tile.rows, "BN": tile.codes, "BK": tile.width,
            },
            **_options(arch, tile),
        )  # fmt: skip


def search(arch, key, tile):
    """`residual_search_kernel`, on a tile that covers the width or in steps of it."""
    rows, codes = TYPES[key[1:]]
    width = WIDE if key[0] == ANY else key[0]
    for metric in METRICS:
        yield Case(
            f"residual-search-{metric}-{text_of(key)}-{arch}", f"{SEARCH}:residual_search_kernel",
            {
                "x": rows, "book": codes, "terms": "*bf16", "offsets": "*fp32", "longest": "*i32",
                "row_levels": "*i32", **OUTPUTS, "quantized": rows, **SIZES,
            },
            {
                "D": width, "METRIC": metric, "ROW_TERMS": key[1], "CODE_TERMS": key[2], "UPCAST": False,
                "LEVELS": True, "QUANTIZE": True, "REL": 1e-5, "LANES": key[0] != ANY, "BM": tile.rows,
                "BN": tile.codes, "BD": tile.width, "BV": tile.settle_codes, "BK": tile.settle_width,
            },
            **_options(arch, tile),
        )  # fmt: skip


def settle(arch, key, tile):
    """`settle_kernel` and `sum_codes_kernel`."""
    width = WIDE if key[0] == ANY else key[0]
    for terms, (rows, codes) in TYPES.items():
        for metric in METRICS:
            yield Case(
                f"settle-{metric}-{text_of(terms)}-{text_of(key)}-{arch}", f"{SEARCH}:settle_kernel",
                {
                    "x": rows, "book": codes, "longest": "*i32", "scores": "*fp32", "indices": "*i32",
                    "row_levels": "*i32", **OUTPUTS, **SIZES, "level": "i32", "parts": "i32",
                },
                {
                    "D": width, "METRIC": metric, "REL": 1e-5, "LEVELS": True, "QUANTIZE": True, "BM": tile.rows,
                    "BV": tile.codes, "BK": tile.width,
                },
                tile.warps, capabilities=(capability_of(arch),),
            )  # fmt: skip
    yield Case(
        f"sum-codes-{text_of(key)}-{arch}", f"{SEARCH}:sum_codes_kernel",
        {"book": "*bf16", "codes": "*i32", "quantized": "*bf16", **SIZES},
        {"D": width, "BM": tile.rows, "BK": tile.width}, tile.warps, capabilities=(capability_of(arch),),
    )  # fmt: skip


def losses():
    """`mean_error_kernel`."""
    from ztok_fast.ops.nearest.triton_configs import SUMS

    yield Case(
        "mean-error", f"{SEARCH}:mean_error_kernel",
        {"sums": "*fp64", "commitment": "*fp32", "codebook_loss": "*fp32", "parts": "i32"}, {"D": WIDE, "BP": SUMS}, 4,
    )  # fmt: skip


def prepare(arch, key, tile):
    """`prepare_codes_kernel`."""
    for terms, (_, codes) in TYPES.items():
        yield Case(
            f"prepare-codes-{text_of(terms)}-{text_of(key)}-{arch}", f"{SEARCH}:prepare_codes_kernel",
            {"book": codes, "terms": "*bf16", "offsets": "*fp32", "longest": "*i32", "V": "i32"},
            {"D": WIDE, "METRIC": "l2", "CODE_TERMS": terms[1], "BV": tile.rows, "BK": tile.width},
            tile.warps, capabilities=(capability_of(arch),),
        )  # fmt: skip


def gradients(arch, key, tile):
    """The backward passes of the search."""
    from ztok_fast.ops.nearest.triton_gradients import PIECE

    block = {"D": WIDE, "BM": tile.rows, "BK": tile.width}
    pieces = {"starts": "*i64", "first_piece": "*i64", "sums": "*fp32"}
    launch = {"num_warps": tile.warps, "capabilities": (capability_of(arch),)}
    name = f"{text_of(key)}-{arch}"
    yield Case(
        f"cosine-parts-{name}", f"{GRADIENT}:cosine_parts_kernel",
        {"x": "*bf16", "book": "*fp32", "codes": "*i32", "parts": "*fp32", **SIZES}, block, **launch,
    )  # fmt: skip
    for metric, quantize in (("l2", True), ("l2", False), ("cosine", False)):
        yield Case(
            f"row-gradients-{'quantize' if quantize else metric}-{name}", f"{GRADIENT}:row_gradients_kernel",
            {
                "x": "*bf16", "book": "*fp32", "codes": "*i32", "weights": "*fp32", "parts": "*fp32", "add": "*bf16",
                "factor": "*fp32", "grad_x": "*bf16", "to_codes": "*fp32", **SIZES,
            },
            {**block, "METRIC": metric, "QUANTIZE": quantize}, **launch,
        )  # fmt: skip
    yield Case(
        f"sum-piece-{name}", f"{GRADIENT}:sum_piece_kernel",
        {"values": "*fp32", "order": "*i64", "run_of_piece": "*i64", "runs": "i32", **pieces},
        {**block, "PIECE": PIECE}, **launch,
    )  # fmt: skip
    yield Case(
        f"sum-run-{name}", f"{GRADIENT}:sum_run_kernel",
        {"sums": "*fp32", "first_piece": "*i64", "factor": "*fp32", "grad": "*bf16"},
        {"D": WIDE, "FACTOR": True, "BK": tile.width}, **launch,
    )  # fmt: skip


TABLES = {
    "WHOLE": search, "WIDE": search, "STEPS": steps, "SETTLE": settle, "PREPARE": prepare, "GRADIENTS": gradients,
}  # fmt: skip
QUICK = (
    "residual-search-l2-64-2-2-sm_90", "residual-search-l2-any-2-2-sm_90", "scan-1024-any-1-1-sm_90",
    "scan-1024-64-2-1-sm_80", "settle-l2-2-2-any-sm_100", "prepare-codes-2-2-any-sm_80", "sum-codes-any-sm_90",
    "row-gradients-quantize-any-sm_90", "mean-error",
)  # fmt: skip
