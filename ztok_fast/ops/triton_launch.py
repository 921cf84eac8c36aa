"""How Triton kernels are launched: one configuration per kernel, and a few others that are timed only when asked for.

The defaults are chosen from what the compiler reports (no spills, shared memory, registers), not from timings. They
hold for every architecture, so that `tests/ops/test_aot.py` compiles what every device runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ztok_fast.ops.backends import triton_is_interpreted

if TYPE_CHECKING:
    import triton

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
        configs: the default first, then those that `autotune` compares it with. Sizes that the host code reads (to
            allocate what the kernel writes) must be the same in all; a grid may be a function of the sizes instead.
        key: arguments for whose values the comparison is made anew; it always is for other dtypes.
        writes: tensors that the kernel both reads and writes; they are restored after each timed run.
        adds: tensors that the kernel adds to; they are set to zero before each timed run.
        fusion: whether the compiler may fuse a product and a sum, which rounds once instead of twice.
    """

    def __init__(
        self,
        kernel: Any,
        *configs: triton.Config,
        key: tuple[str, ...] = (),
        writes: tuple[str, ...] = (),
        adds: tuple[str, ...] = (),
        fusion: bool = True,
    ) -> None:
        self.kernel, self.configs = kernel, configs
        self._tuning = {"key": key, "writes": writes, "adds": adds}
        # fusion is said because its default differs between releases of Triton
        self._fusion = {"enable_fp_fusion": fusion}
        self._options = {**configs[0].all_kwargs(), **self._fusion}
        self._smaller: dict[tuple, Tiles] = {}
        self._tuner: Any = None

    @classmethod
    def of(cls, kernel: Any, names: str, *rows: tuple[int, ...], maxnreg: int | None = None, **tuning) -> Tiles:
        """The same from a row of numbers per configuration: the sizes that `names` names, warps, stages.

        `maxnreg`: registers that a thread may have. Left to itself the compiler saves a few numbers in memory where
        one block more fits then; it does not where it is given a limit.
        """
        from triton import Config

        sizes = names.split()
        configs = [
            Config(dict(zip(sizes, row)), maxnreg=maxnreg, **dict(zip(("num_warps", "num_stages"), row[len(sizes) :])))
            for row in rows
        ]
        return cls(kernel, *configs, **tuning)

    def __getattr__(self, name: str) -> int:
        if name.isupper() and name in self.configs[0].kwargs:
            return self.configs[0].kwargs[name]
        raise AttributeError(name)

    def at_most(self, **sizes: int) -> Tiles:
        """The same with sizes no larger than these powers of two."""
        limits = tuple(sizes.items())
        if limits not in self._smaller:
            from triton import Config

            distinct: dict[tuple, triton.Config] = {}
            for config in self.configs:
                kwargs = {name: min(size, sizes.get(name, size)) for name, size in config.kwargs.items()}
                small = Config(kwargs, num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg)
                distinct.setdefault(tuple(small.all_kwargs().items()), small)
            self._smaller[limits] = Tiles(
                self.kernel, *distinct.values(), **self._tuning, fusion=self._fusion["enable_fp_fusion"]
            )
        return self._smaller[limits]

    def __getitem__(self, grid: tuple[int, ...] | Callable[[dict], tuple[int, ...]]) -> Callable:
        if _autotune and len(self.configs) > 1:
            return functools.partial(self._tuned()[grid], **self._fusion)
        launch = self.kernel[grid(self.configs[0].kwargs) if callable(grid) else grid]
        return functools.partial(launch, **self._options)

    def _tuned(self) -> Any:
        if self._tuner is None:
            import triton

            # the interpreter has no clock worth looking at: the default is taken
            untimed = {"do_bench": _untimed} if triton_is_interpreted() else {}
            tuned = triton.autotune(
                configs=list(self.configs),
                key=list(self._tuning["key"]),
                restore_value=list(self._tuning["writes"]),
                reset_to_zero=list(self._tuning["adds"]),
                **untimed,
            )
            self._tuner = tuned(self.kernel)
        return self._tuner
