"""Compile cases of `tests.ops.aot_cases` ahead of time: `python -m tests.ops.aot_compile CAPABILITY NAME...`.

Runs as a program of its own, without TRITON_INTERPRET, because an interpreted kernel cannot be compiled in the same
process. Prints one JSON object per case: the resources that ptxas reports and the instructions that were looked for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
import traceback

REPORT = {
    "registers": r"Used (\d+) registers",
    "stack": r"(\d+) bytes stack frame",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
}
INSTRUCTIONS = ("wgmma", "mma.sync", "tcgen05.mma")


def compile_case(case, capability: int) -> dict:
    """Compile one case and report on the code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = case.kernel.split(":")
    kernel = getattr(importlib.import_module(module), function)
    unknown = set(kernel.arg_names) ^ {*case.signature, *case.constexprs}
    if unknown:
        raise ValueError(f"{case.name}: arguments missing or too many: {', '.join(sorted(unknown))}")
    signature = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [n for n, kind in case.signature.items() if kind.startswith("*") or n in case.divisible]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, case.constexprs, attributes)
    # ptxas is called by Triton with -v; its log is what Triton prints when asked to
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": case.num_warps, "num_stages": case.num_stages},
        )
    found = {key: re.findall(pattern, log.getvalue()) for key, pattern in REPORT.items()}
    if not all(found.values()):
        raise ValueError(f"{case.name}: ptxas gave no resource report: {log.getvalue()!r}")
    ptx = compiled.asm["ptx"]
    return {
        "name": case.name,
        **{key: max(map(int, values)) for key, values in found.items()},
        "shared": compiled.metadata.shared,
        "instructions": [i for i in INSTRUCTIONS if i in ptx],
        "target": re.search(r"\.target (\w+)", ptx)[1],
        "cubin_bytes": len(compiled.asm["cubin"]),
    }


def main(capability: str, *names: str) -> None:
    """Compile the named cases for one compute capability."""
    from tests.ops.aot_cases import by_name

    cases = by_name()
    for name in names:
        try:
            print(json.dumps(compile_case(cases[name], int(capability))), flush=True)
        except Exception:  # the other cases are compiled all the same; the test shows what is printed here
            traceback.print_exc()


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main(*sys.argv[1:])
