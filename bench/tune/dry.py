"""What candidates take, from the ahead-of-time compilation: no GPU, no time."""

from __future__ import annotations

from collections.abc import Iterable

from bench.tune.entry import Entry, text
from ztok_fast.ops.triton_tables import architecture


def report(entries: Iterable[Entry], capabilities: Iterable[int], most: int | None) -> None:
    """Compile `most` candidates of each entry, or all, and print the kernel of each that takes the most registers.

    Prints per candidate: registers, bytes of stack (spills) and of shared memory, and how many blocks of it a
    multiprocessor holds by its registers and shared memory; "no" where a kernel spills or asks for too much.
    """
    from tests.ops.aot_cases import SHARED_LIMITS, cases_of
    from tests.ops.aot_compile import compile_case

    print(f"{'arch':<7}{'table':<18}{'key':<20}{'candidate':<34}{'regs':>5}{'stack':>6}{'shared':>8}{'blocks':>7}")
    entries = list(entries)
    for capability in capabilities:
        arch = architecture((capability // 10, 0))
        for entry in entries:
            for candidate in entry.candidates[:most]:
                cases = list(cases_of(entry.family, entry.table, arch, entry.key, candidate))
                try:
                    reports = [compile_case(case, capability) for case in cases]
                except Exception as reason:  # a tile that the compiler refuses is no reason to leave out the others
                    print(f"{arch:<7}{entry.name}: {tuple(candidate)}: {type(reason).__name__}: {str(reason)[:200]}")
                    continue
                registers, stack, shared = (max(r[what] for r in reports) for what in ("registers", "stack", "shared"))
                spills = max(stack, *(r["spill_stores"] for r in reports))
                threads = 32 * max(case.num_warps for case in cases)
                blocks = min(65536 // (registers * threads), 2048 // threads, SHARED_OF[capability] // (shared + 1024))
                fits = spills == 0 and shared <= SHARED_LIMITS[capability]
                mark = " *" if entry.of(arch).get(entry.key) == candidate else ""
                print(
                    f"{arch:<7}{entry.family + '.' + entry.table:<18}{text(entry.key):<20}{str(tuple(candidate)):<34}"
                    f"{registers:>5}{stack:>6}{shared:>8}{blocks:>7}{mark}{'' if fits else '  no'}",
                    flush=True,
                )


# shared memory of a multiprocessor, of which every block takes 1 KiB more than it asks for
SHARED_OF = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
