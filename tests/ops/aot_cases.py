"""Every Triton kernel as it is launched, for `tests/ops/test_aot.py`, which compiles it ahead of time without a GPU.

To add a kernel, append one `Case` to `CASES` (or a loop over the configurations that your launcher can pick, imported
from the module that picks them, so that what is tested is what is launched):

    Case(
        "halting-scan",                                      # unique; shows in test ids
        "ztok_fast.ops.halting.triton:scan_kernel",          # the @triton.jit function
        {"mass": "*fp32", "units": "*i32", "rows": "i32"},   # run-time arguments in any order
        {"BLOCK": 1024},                                     # constexpr arguments
        num_warps=4,
    )

Types are *fp16, *bf16, *fp32, *fp64, *i1, *i8, *i16, *i32, *i64 for pointers and i32, i64, fp32, fp64 for numbers.
Pointers are taken to be aligned to 16 bytes, as those of whole tensors are; name the numbers that are multiples of 16
in `divisible`. Any other pointer that is passed as None goes into the constexprs as None.

For each architecture the test asserts that the code has no stack frame and no spills, at most `max_shared` bytes of
shared memory, and for sm_90a the instructions named in `sm90_needs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.ops.aot_units import unit_cases

# compute capability -> name of the architecture whose code is made (the features of 90a and 100a included)
ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
# bytes of shared memory that one block may have, by compute capability
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Case:
    """One kernel with one signature and one set of constants.

    Attributes:
        name: unique name, shown in test ids.
        kernel: "module:function".
        signature: type of each run-time argument.
        constexprs: value of each constexpr argument.
        num_warps, num_stages: launch options.
        divisible: run-time numbers that are multiples of 16.
        capabilities: keys of `ARCHITECTURES` that it is compiled for.
        sm90_needs: instructions that its PTX for sm_90a must contain.
        slow: leave it to the slow tests.
    """

    name: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = tuple(ARCHITECTURES)
    sm90_needs: tuple[str, ...] = ()
    slow: bool = False


CASES: list[Case] = []


_NEAREST = "ztok_fast.ops.nearest.triton_kernels"
# (row terms, code terms) -> types of rows and codebook
_NEAREST_TYPES = {(1, 1): ("*bf16", "*bf16"), (2, 1): ("*fp32", "*bf16"), (2, 2): ("*fp32", "*fp32")}
_NEAREST_OUTPUTS = {"residual": "*fp32", "codes": "*i32", "distances": "*fp32", "usage": "*i64"}


def nearest_case(table, arch, key, tile, width=1024, metric="l2"):
    """A tile of one of the tables of the nearest-code search, `WHOLE` or `STEPS`, with the key of its entry."""
    from ztok_fast.ops.nearest import triton_configs as configs

    terms = key[-2:]
    rows, codes = _NEAREST_TYPES[terms]
    capability = next(c for c in ARCHITECTURES if configs.architecture((c // 10, 0)) == arch)
    options = {
        "num_warps": tile.warps, "num_stages": tile.stages, "capabilities": (capability,), "sm90_needs": ("wgmma",),
    }  # fmt: skip
    constants = {
        "METRIC": metric, "ROW_TERMS": terms[0], "CODE_TERMS": terms[1], "UPCAST": False, "BM": tile.rows,
        "BN": tile.codes,
    }  # fmt: skip
    name = f"{terms[0]}x{terms[1]}-{arch}"
    if table == "STEPS":
        return Case(
            f"scan-{width}-{name}", f"{_NEAREST}:scan_kernel",
            {
                "x": rows, "terms": "*bf16", "low_terms": "*bf16", "offsets": "*fp32", "row_levels": "*i32",
                "scores": "*fp32", "indices": "*i32", "M": "i32", "V": "i32", "tiles": "i32", "level": "i32",
            },
            {"D": width, **constants, "LEVELS": True, "BK": tile.width}, slow=(width, *terms) != (1024, 1, 1), **options,
        )  # fmt: skip
    lanes = table == "WHOLE"
    width = key[0] if lanes else width
    return Case(
        f"residual-search-{width}-{metric}-{name}", f"{_NEAREST}:residual_search_kernel",
        {
            "x": rows, "book": codes, "terms": "*bf16", "offsets": "*fp32", "longest": "*i32", "row_levels": "*i32",
            **_NEAREST_OUTPUTS, "quantized": rows, "M": "i32", "V": "i32", "L": "i32",
        },
        {
            "D": width, **constants, "LEVELS": True, "QUANTIZE": True, "LANES": lanes, "REL": 1e-5, "BD": tile.width,
            "BV": configs.SETTLE_CODES_INSIDE, "BK": configs.SETTLE_WIDTH_INSIDE,
        },
        slow=key != (64, 2, 2), **options,
    )  # fmt: skip


def _nearest_cases():
    """The kernels of the nearest-code search with the tiles of their tables."""
    from ztok_fast.ops.nearest import triton_configs as configs

    module, types, outputs = _NEAREST, _NEAREST_TYPES, _NEAREST_OUTPUTS
    settle = {"REL": 1e-5, "BV": configs.SETTLE_CODES, "BK": configs.SETTLE_WIDTH}
    for arch in configs.WHOLE:
        for key, tile in configs.WHOLE[arch].items():
            yield nearest_case("WHOLE", arch, key, tile)
        for key, tile in configs.WIDE[arch].items():
            for metric in ("l2", "cosine", "dot"):
                yield nearest_case("WIDE", arch, key, tile, metric=metric)
        for key, tile in configs.STEPS[arch].items():
            for width in (64, 1024):
                yield nearest_case("STEPS", arch, key, tile, width)
    for terms, (rows, codes) in types.items():
        for metric in ("l2", "cosine", "dot"):
            yield Case(
                f"settle-{metric}-{terms[0]}x{terms[1]}",
                f"{module}:settle_kernel",
                {
                    "x": rows, "book": codes, "longest": "*i32", "scores": "*fp32", "indices": "*i32",
                    "row_levels": "*i32", **outputs, "M": "i32", "V": "i32", "L": "i32", "level": "i32", "parts": "i32",
                },
                {"D": 1024, "METRIC": metric, **settle, "BM": configs.SETTLE_ROWS, "LEVELS": True, "QUANTIZE": True},
                configs.SETTLE_WARPS, slow=(metric, terms) != ("l2", (2, 2)),
            )  # fmt: skip
        yield Case(
            f"prepare-codes-{terms[0]}x{terms[1]}",
            f"{module}:prepare_codes_kernel",
            {"book": codes, "terms": "*bf16", "offsets": "*fp32", "longest": "*i32", "V": "i32"},
            {"D": 64, "METRIC": "l2", "CODE_TERMS": terms[1], "BV": 32, "BK": 64},
            slow=terms != (2, 2),
        )
    yield Case(
        "sum-codes",
        f"{module}:sum_codes_kernel",
        {"book": "*bf16", "codes": "*i32", "quantized": "*bf16", "M": "i32", "V": "i32", "L": "i32"},
        {"D": 64, "BM": configs.SETTLE_ROWS, "BK": configs.SETTLE_WIDTH},
        configs.SETTLE_WARPS,
    )


def _gradient_cases():
    """The backward passes of the residual search."""
    from ztok_fast.ops.nearest import triton_gradients as gradients

    module = "ztok_fast.ops.nearest.triton_gradients"
    sizes = {"M": "i32", "V": "i32", "L": "i32"}
    tile = {"D": 64, "BM": gradients.ROWS, "BK": gradients.WIDTH}
    yield Case(
        "cosine-parts", f"{module}:cosine_parts_kernel",
        {"x": "*bf16", "book": "*fp32", "codes": "*i32", "parts": "*fp32", **sizes}, tile, slow=True,
    )  # fmt: skip
    for metric, quantize in (("l2", True), ("cosine", False)):
        yield Case(
            f"row-gradients-{metric}", f"{module}:row_gradients_kernel",
            {
                "x": "*bf16", "book": "*fp32", "codes": "*i32", "weights": "*fp32", "parts": "*fp32", "add": "*bf16",
                "factor": "*fp32", "grad_x": "*bf16", "to_codes": "*fp32", **sizes,
            },
            {**tile, "METRIC": metric, "QUANTIZE": quantize}, slow=not quantize,
        )  # fmt: skip
    pieces = {"starts": "*i64", "first_piece": "*i64", "sums": "*fp32"}
    yield Case(
        "sum-piece", f"{module}:sum_piece_kernel",
        {"values": "*fp32", "order": "*i64", "run_of_piece": "*i64", "runs": "i32", **pieces},
        {**tile, "PIECE": gradients.PIECE}, slow=True,
    )  # fmt: skip
    yield Case(
        "sum-run", f"{module}:sum_run_kernel",
        {"sums": "*fp32", "first_piece": "*i64", "factor": "*fp32", "grad": "*bf16"},
        {"D": 64, "FACTOR": True, "BK": gradients.WIDTH}, slow=True,
    )  # fmt: skip


def _zhead_cases():
    """The kernels of the Z head, sampling, in the type that is read most and in float32."""
    from ztok_fast.ops.zhead import triton as zhead

    module = "ztok_fast.ops.zhead.triton_kernels"
    key = {name: "i32" for name in ("temperature_low", "temperature_high", "seed_low", "seed_high", "step")}
    for kind, size in (("bf16", 2), ("fp32", 4)):
        batch, codes, width, warps, stages = zhead.TILES[size]
        shared = {"D": 576, "SAMPLE": True, "ROW_IDS": True}
        tensors = {
            "hidden": f"*{kind}", "rows": f"*{kind}", "row_ids": "*i64", "scores": "*fp32", "indices": "*i32",
            "sums": "*fp32", "V": "i32", "parts": "i32",
        }  # fmt: skip
        yield Case(
            f"zhead-scan-{kind}", f"{module}:scan_kernel", {**tensors, "B": "i32", "tiles": "i32", **key},
            {**shared, "UPCAST": False, "BB": batch, "BV": codes, "BK": width},
            warps, stages, sm90_needs=("wgmma",) if size == 2 else (), slow=kind == "fp32",
        )  # fmt: skip
        yield Case(
            f"zhead-select-{kind}", f"{module}:select_kernel",
            {**tensors, "codes": "*i32", "log_probs": "*fp32", **key},
            {**shared, "REL": 1e-5, "P": zhead.MOST_PARTS, "BC": zhead.EXACT_CODES, "BK": zhead.EXACT_WIDTH},
            slow=kind == "fp32",
        )  # fmt: skip


def _lora_cases():
    """The LoRA kernels over dtypes, one adapter or several, and the tiles that these are given."""
    from ztok_fast.ops.lora import triton_configs as configs

    module = "ztok_fast.ops.lora.triton_kernels"
    numbers = dict.fromkeys(("M", "N", "K", "R", "n"), "i32")
    for capability in (80, 90):
        capabilities = (80,) if capability == 80 else (90, 100)
        for dtype, adapter_type in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")):
            single = {"SINGLE": True, "adapters": None}
            several = {"SINGLE": False}
            exact = dtype == "fp32"
            for many, rows in ((False, 64), (False, 4096), (True, 64), (True, 4096)):
                tile = configs.linear_tile(rows, exact, many, (capability // 10, 0))
                for transposed in (False, True):
                    if transposed and (rows == 64 or adapter_type != dtype):
                        continue
                    # the stride of a contiguous dimension is specialised away as the constant 1
                    strides = {"stride_k": 1, "stride_up_r": 1} if not transposed else {"stride_c": 1, "stride_up_c": 1}
                    names = ("stride_x", "stride_k", "stride_c", "stride_up_n", "stride_up_r", "stride_up_c")
                    free = tuple(name for name in names if name not in strides)
                    pointers = {n: f"*{dtype}" for n in ("x", "weight", "bias", "y")}
                    signature = pointers | {"up": f"*{adapter_type}", "low_rank": "*fp32"} | numbers
                    signature |= dict.fromkeys(free, "i32") | ({"adapters": "*i32"} if many else {})
                    yield Case(
                        f"lora-{'dx' if transposed else 'linear'}-{dtype}-{adapter_type}-{rows}-"
                        f"{'several' if many else 'single'}-{capability}",
                        f"{module}:lora_linear_kernel",
                        signature,
                        {
                            **(several if many else single), **strides, "EVEN_K": True, "EXACT": exact,
                            "UPCAST": False, "BM": tile.rows, "BN": tile.columns, "BK": tile.inner,
                            "BR": configs.low_rank_step(tile, adapter_type != "bf16"), "GROUP": configs.GROUP,
                        },
                        tile.warps, tile.stages, ("N", "K", "R", *free), capabilities,
                        sm90_needs=("wgmma",) if capability == 90 else (),
                        slow=(dtype, adapter_type, many, rows) != ("bf16", "bf16", True, 4096),
                    )  # fmt: skip
    for dtype, adapter_type in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
        exact = adapter_type == "fp32"
        for rows in (64, 16384):
            tile = configs.shrink_tile(rows, exact)
            yield Case(
                f"lora-shrink-{dtype}-{adapter_type}-{rows}",
                f"{module}:shrink_kernel",
                {
                    "x": f"*{dtype}", "down": f"*{adapter_type}", "scaling": "*fp32", "adapters": "*i32",
                    "low_rank": "*fp32", "M": "i32", "K": "i32", "R": "i32", "n": "i32", "stride_x": "i32",
                    "stride_n": "i32", "stride_r": "i32",
                },
                {
                    "stride_k": 1, "SINGLE": False, "EXACT": exact, "UPCAST": False, "BM": tile.rows,
                    "BR": configs.SHRINK_RANKS, "BK": tile.inner,
                },
                tile.warps, tile.stages, ("K", "R", "stride_x", "stride_n", "stride_r"),
                slow=(dtype, adapter_type, rows) != ("bf16", "bf16", 16384),
            )  # fmt: skip
        yield Case(
            f"lora-outer-{dtype}-{adapter_type}",
            f"{module}:outer_kernel",
            {
                "low_rank": "*fp32", "right": f"*{dtype}", "adapters": "*i32", "out": "*fp32", "M": "i32", "N": "i32",
                "R": "i32", "n": "i32", "chunks_per_part": "i32", "stride_right": "i32", "stride_part": "i32",
                "stride_n": "i32", "stride_r": "i32",
            },
            {
                "stride_c": 1, "SINGLE": False, "EXACT": dtype == "fp32", "UPCAST": False, "CHUNK": configs.OUTER_CHUNK,
                "BM": configs.OUTER_ROWS, "BN": configs.OUTER_COLUMNS, "BR": configs.OUTER_RANKS,
            },
            configs.OUTER_WARPS, configs.OUTER_STAGES, ("N", "R", "stride_right", "stride_n", "stride_r"),
            slow=exact,
        )  # fmt: skip
    yield Case(
        "lora-row-adapters",
        f"{module}:row_adapters_kernel",
        {"adapters": "*i32", "cu_seqlens": "*i64", "out": "*i32", "M": "i32", "sequences": "i32", "n": "i32"},
        {"BM": 256},
    )


CASES += (*_nearest_cases(), *_gradient_cases(), *_zhead_cases(), *_lora_cases())
CASES += unit_cases(Case)

# compiled by the test of the test alone
SPILLS = Case("spills", "tests.ops.aot_spills:spill_kernel", {"x": "*fp32", "y": "*fp32"}, {"B": 64}, num_warps=1)


def by_name() -> dict[str, Case]:
    """All cases by their names."""
    return {case.name: case for case in (*CASES, SPILLS)}
