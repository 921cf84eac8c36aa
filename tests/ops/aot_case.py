"""One Triton kernel as it is launched: what the files of cases share."""

from __future__ import annotations

from dataclasses import dataclass, field

from ztok_fast.ops.triton_tables import ANY

# compute capability -> name of the architecture whose code is made (the features of 90a and 100a included)
ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
# bytes of shared memory that one block may have, by compute capability; the entries of sm_80 serve 8.6 and 8.9 too,
# which have less than 8.0
SHARED_LIMITS = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


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


def text_of(key: tuple) -> str:
    """The key of an entry in the name of a case."""
    return "-".join("any" if part == ANY else str(part).lower() for part in key)


def capability_of(arch: str) -> int:
    """The compute capability that an architecture of the tables is compiled for."""
    return int(arch.removeprefix("sm_"))
