"""Compile cases of the LoRA kernels, from the tables' entries: dtypes, one adapter or several, both operand layouts."""

from tests.ops.aot_case import Case, capability_of, text_of
from ztok_fast.ops.lora import triton_configs as configs

MODULE = "ztok_fast.ops.lora.triton_kernels"
HALF = (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"))
SINGLE = {"SINGLE": True, "adapters": None}
SEVERAL = {"SINGLE": False}


def _options(arch, tile, divisible):
    return {
        "num_warps": tile.warps, "num_stages": tile.stages, "divisible": divisible,
        "capabilities": (capability_of(arch),),
    }  # fmt: skip


def linear(arch, key, tile):
    """`lora_linear_kernel`: y, and dx with the operands transposed."""
    _, float32, several = key
    numbers = dict.fromkeys(("M", "N", "K", "R", "n"), "i32")
    names = ("stride_x", "stride_k", "stride_c", "stride_expand_n", "stride_expand_r", "stride_expand_c")
    for dtype, adapter_type in (("fp32", "fp32"),) if float32 else HALF:
        for transposed in (False, True):
            if transposed and adapter_type != dtype:
                continue
            # the stride of a contiguous dimension is specialised away as the constant 1
            strides = {"stride_k": 1, "stride_expand_r": 1} if not transposed else {"stride_c": 1, "stride_expand_c": 1}
            free = tuple(name for name in names if name not in strides)
            signature = dict.fromkeys(("x", "weight", "bias", "y"), f"*{dtype}")
            signature |= {"expand": f"*{adapter_type}", "low_rank": "*fp32"} | numbers | dict.fromkeys(free, "i32")
            signature |= {"adapters": "*i32"} if several else {}
            yield Case(
                f"lora-{'dx' if transposed else 'linear'}-{dtype}-{adapter_type}-{text_of(key)}-{arch}",
                f"{MODULE}:lora_linear_kernel", signature,
                {
                    **(SEVERAL if several else SINGLE), **strides, "EVEN_K": True, "EXACT": float32, "UPCAST": False,
                    "BM": tile.rows, "BN": tile.columns, "BK": tile.inner,
                    "BR": configs.low_rank_step(tile, adapter_type != "bf16"), "GROUP": configs.GROUP,
                },
                sm90_needs=("wgmma",), **_options(arch, tile, ("N", "K", "R", *free)),
            )  # fmt: skip


def shrink(arch, key, tile):
    """`shrink_kernel`: x Aᵀ, where K is contiguous in the factor, and g B, where the ranks are."""
    _, exact = key
    names = ("stride_x", "stride_n", "stride_r", "stride_k")
    for dtype, factor in (("bf16", "fp32"), ("fp32", "fp32")) if exact else (("bf16", "bf16"),):
        for transposed in (False, True):
            one = "stride_r" if transposed else "stride_k"
            free = tuple(name for name in names if name != one)
            yield Case(
                f"lora-shrink{'-transposed' * transposed}-{dtype}-{factor}-{text_of(key)}-{arch}",
                f"{MODULE}:shrink_kernel",
                {
                    "x": f"*{dtype}", "factor": f"*{factor}", "scaling": "*fp32", "adapters": "*i32",
                    "low_rank": "*fp32", "M": "i32", "K": "i32", "R": "i32", "n": "i32", **dict.fromkeys(free, "i32"),
                },
                {
                    one: 1, **SEVERAL, "EXACT": exact, "UPCAST": False, "BM": tile.rows, "BR": tile.ranks,
                    "BK": tile.inner,
                },
                **_options(arch, tile, ("K", "R", *free)),
            )  # fmt: skip


def outer(arch, key, tile):
    """`outer_kernel`: dA, whose columns are contiguous, and dB, whose ranks are where it is written without parts."""
    _, exact = key
    names = ("stride_right", "stride_part", "stride_n", "stride_r", "stride_c")
    for transposed in (False, True):
        one = "stride_r" if transposed else "stride_c"
        free = tuple(name for name in names if name != one)
        dtype = "fp32" if exact else "bf16"
        yield Case(
            f"lora-outer{'-transposed' * transposed}-{dtype}-{text_of(key)}-{arch}", f"{MODULE}:outer_kernel",
            {
                "low_rank": "*fp32", "right": f"*{dtype}", "adapters": "*i32",
                "out": f"*{dtype}" if transposed else "*fp32", "M": "i32", "N": "i32", "R": "i32", "n": "i32",
                "chunks_per_part": "i32", **dict.fromkeys(free, "i32"),
            },
            {
                one: 1, **SEVERAL, "EXACT": exact, "UPCAST": False, "CHUNK": tile.chunk, "BM": tile.rows,
                "BN": tile.columns, "BR": tile.ranks,
            },
            **_options(arch, tile, ("N", "R", *(name for name in free if name != "stride_part"))),
        )  # fmt: skip


def rest():
    """Kernels that no table is asked for."""
    yield Case(
        "lora-row-adapters", f"{MODULE}:row_adapters_kernel",
        {"adapters": "*i32", "cu_seqlens": "*i64", "out": "*i32", "M": "i32", "sequences": "i32", "n": "i32"},
        {"BM": configs.ADAPTER_ROWS},
    )  # fmt: skip


TABLES = {"LINEAR": linear, "SHRINK": shrink, "OUTER": outer}
QUICK = (
    "lora-linear-bf16-bf16-any-false-true-sm_90", "lora-dx-bf16-bf16-any-false-true-sm_80",
    "lora-shrink-bf16-bf16-any-false-sm_90", "lora-outer-transposed-bf16-any-false-sm_90", "lora-row-adapters",
)  # fmt: skip
