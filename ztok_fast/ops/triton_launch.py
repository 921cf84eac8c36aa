"""How Triton kernels are launched: one configuration per kernel, and a few others that are timed only when asked for.

The defaults are chosen from what the compiler reports (no spills, shared memory, registers), not from timings. They
hold for every architecture, so that `tests/ops/test_aot.py` compiles what every device runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ztok_fast.ops.backends import triton_is_interpreted

_autotune = False


def autotune(enabled: bool = True) -> None:
    """Time a few configurations of each Triton kernel when it first meets a shape, and use the fastest from then on.

    Off unless it is asked for: nothing is timed in a user's call, and every kernel has one configuration. The choice
    holds for the whole process. A first call takes seconds; it can neither be captured in a CUDA graph nor change
    codes, but gradients and products may differ in their last bits from one configuration to another.
    """
    global _autotune
    _autotune = enabled


def _untimed(call: Callable, quantiles: tuple[float, ...]) -> list[float]:
    return [0.0] * len(quantiles)


def parts_of(tiles: int, blocks: int, full: int, most: int) -> tuple[int, int]:
    """How many parts, `most` at most, `tiles` of columns are cut into so that `blocks` of rows by parts make about
    `full` programs; and the tiles of a part."""
    in_part = -(-tiles // max(1, min(tiles, most, full // blocks)))
    return -(-tiles // in_part), in_part


class Tiles:
    """A kernel with its tile sizes: `tiles[grid](...)` launches it, `tiles.BM` is a size that its grid depends on.

    Args:
        kernel: the `@triton.jit` function.
        names: of its tile sizes.
        configs: those sizes, the warps and (3 if left out) the stages: the default first, then those that `autotune`
            compares it with. Sizes that the host code reads (to allocate what the kernel writes) must be the same in
            all; a grid may be a function of the sizes instead.
        key: arguments for whose values the comparison is made anew; it always is for other dtypes.
        writes: tensors that the kernel both reads and writes; they are restored after each timed run.
        adds: tensors that the kernel adds to; they are set to zero before each timed run.
        maxnreg: registers that a thread may have. Left to itself the compiler saves a few numbers in memory where one
            block more fits then; it does not where it is given a limit.
        fusion: whether the compiler may fuse a product and a sum, which rounds once instead of twice.
    """

    def __init__(
        self,
        kernel: Any,
        names: str,
        *configs: tuple[int, ...],
        key: tuple[str, ...] = (),
        writes: tuple[str, ...] = (),
        adds: tuple[str, ...] = (),
        maxnreg: int | None = None,
        fusion: bool = True,
    ) -> None:
        self.kernel, self.names, self.configs = kernel, names, configs
        self.sizes = dict(zip(names.split(), configs[0]))
        self._limits = {} if maxnreg is None else {"maxnreg": maxnreg}
        # fusion is said because its default differs between releases of Triton
        self._fusion = {"enable_fp_fusion": fusion}
        self._options = {**self.sizes, **self._resources(configs[0]), **self._fusion}
        settings = {"key": key, "writes": writes, "adds": adds, "maxnreg": maxnreg, "fusion": fusion}
        self._settings: dict[str, Any] = settings
        self._smaller: dict[tuple, Tiles] = {}
        self._tuner: Any = None

    def _resources(self, config: tuple[int, ...]) -> dict[str, int]:
        warps, stages = (*config[len(self.sizes) :], 3)[:2]
        return {"num_warps": warps, "num_stages": stages, **self._limits}

    def __getattr__(self, name: str) -> int:
        if name.isupper() and name in self.sizes:
            return self.sizes[name]
        raise AttributeError(name)

    def at_most(self, **limits: int) -> Tiles:
        """The same with sizes no larger than these powers of two."""
        key = tuple(limits.items())
        if key not in self._smaller:
            names = list(self.sizes)
            cut = [
                (*(min(limits.get(name, size), size) for name, size in zip(names, config)), *config[len(names) :])
                for config in self.configs
            ]
            self._smaller[key] = Tiles(self.kernel, self.names, *dict.fromkeys(cut), **self._settings)
        return self._smaller[key]

    def __getitem__(self, grid: tuple[int, ...] | Callable[[dict], tuple[int, ...]]) -> Callable:
        if _autotune and len(self.configs) > 1:
            return functools.partial(self._tuned()[grid], **self._fusion)
        return functools.partial(self.kernel[grid(self.sizes) if callable(grid) else grid], **self._options)

    def _tuned(self) -> Any:
        if self._tuner is None:
            import triton

            # the interpreter has no clock worth looking at: the default is taken
            untimed = {"do_bench": _untimed} if triton_is_interpreted() else {}
            tuned = triton.autotune(
                configs=[triton.Config(dict(zip(self.sizes, c)), **self._resources(c)) for c in self.configs],
                key=list(self._settings["key"]),
                restore_value=list(self._settings["writes"]),
                reset_to_zero=list(self._settings["adds"]),
                **untimed,
            )
            self._tuner = tuned(self.kernel)
        return self._tuner
