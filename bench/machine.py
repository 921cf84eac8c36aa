"""The machine that is measured on: its threads, what it reaches (the marks), and what is recorded of it."""

from __future__ import annotations

import datetime
import os
import shlex
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THREADS_VARIABLE = "OMP_NUM_THREADS"
PINNED = {"GOMP_SPINCOUNT": "0"}
"""Set before libgomp is loaded, unless the user has set it: where threads spin for work, a machine with as many busy
processes as cores gives small ops multiples of a scheduler tick."""
RECORDED = (
    "OMP_ GOMP_ KMP_ OPENBLAS_ MKL_ MALLOC_ GLIBC_TUNABLES TORCH ZTOK_ TRITON_ CUDA_VISIBLE_DEVICES PYTORCH_ LD_PRELOAD"
)
"""Beginnings of the names of environment variables that go into the results."""
PACKAGES = ("faiss-cpu", "vector-quantize-pytorch", "flash-kmeans", "matplotlib")


def environment(module: str, arguments: list[str]) -> dict:
    """Facts for a results file: those of the doctor, command, commit, date, load, versions and variables.

    Args:
        module: the script's module name, e.g. `"bench.generation"`; arguments: its command line.
    """
    from ztok_fast import doctor

    found = {"command": shlex.join(["python", "-m", module, *arguments]), "commit": commit(), **doctor.environment()}
    found["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found["load_average"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found["cpu"]["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    recorded = tuple(RECORDED.split())
    found["variables"] |= {name: value for name, value in sorted(os.environ.items()) if name.startswith(recorded)}
    installed = {own.name: own.version for own in metadata.distributions() if own.name in PACKAGES}
    found["packages"] |= {name: installed.get(name) for name in PACKAGES}
    return found


def commit() -> str | None:
    """The checkout's commit, with `-dirty` where tracked files differ from it.

    Outside a checkout that of the variable `BENCH_COMMIT`, for a tree that was copied without its history; else `None`.
    """
    # Without this, a source tree unpacked inside another project's checkout would report that project's commit.
    if not (ROOT / ".git").exists():
        return os.environ.get("BENCH_COMMIT")
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def made_with(results: dict) -> str:
    """The command and the machine of a results file, as a sentence."""
    return f"Measured by `{results['environment']['command']}` ({summary(results['environment'])})."


def summary(facts: dict) -> str:
    """Versions and machine of an `environment`, that of a bench or that of `ztok eval`, in one line."""
    own, cpu = facts["packages"], facts["cpu"]
    parts = [f"commit {facts['commit']}"] if facts.get("commit") else []
    parts += [f"Python {facts['python']}"]
    parts += [f"{name} {own[name]}" for name in ("torch", "transformers", "peft") if own.get(name)]
    counts = [(cpu[name], name) for name in ("cores", "threads") if name in cpu]
    parts.append(", ".join([cpu["model"], *(f"{n} {name if n != 1 else name[:-1]}" for n, name in counts)]))
    return "; ".join(parts + [device["name"] for device in facts["cuda"]["devices"]])


def restart_with_pinned_environment(arguments: list[str], threads: int | None) -> None:
    """Start `python -m bench` anew with the pinned variables, if they are not set; torch must not be imported before.

    Args:
        arguments: its command line; threads: OpenMP threads, None for the user's.
    """
    wanted = {name: value for name, value in PINNED.items() if name not in os.environ}
    if threads is not None and os.environ.get(THREADS_VARIABLE) != str(threads):
        wanted[THREADS_VARIABLE] = str(threads)
    if not wanted:
        return
    if "torch" in sys.modules:
        raise RuntimeError(f"{', '.join(wanted)} must be set before torch is imported")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "bench", *arguments], {**os.environ, **wanted})


def pin_threads(threads: int | None) -> None:
    """Give torch and faiss the same number of threads; None: torch's own."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())


def last_cache_bytes(device) -> int:
    """Size of the last cache: L2 of a GPU, the largest that Linux reports of the CPU, 32 MB where it reports none."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).L2_cache_size
    paths = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    texts = [path.read_text().strip() for path in paths]  # such as 32K
    return max([32 << 20, *(int(text[:-1]) << 10 for text in texts if text.endswith("K"))])


def marks(device, seconds: float = 1.0, size: int | None = None, count: int | None = None) -> dict:
    """What the machine reaches now: GFLOP/s of a large `torch.mm` and GB/s (read + written) of a large copy.

    Args:
        size: of the square matrices; count: bytes to copy. None for large ones: 2048 and 128 MB on a CPU, 8192 and
            1 GB on a GPU.

    Returns:
        `mm_gflops` by dtype, `mm_size`, `copy_gbs`, `copy_bytes`. Medians; on random data.
    """
    import torch

    from bench.timing import Timed, take_turns

    cuda = device.type == "cuda"
    size = size or (8192 if cuda else 2048)
    count = count or ((1 << 30) if cuda else (1 << 27))

    def product(dtype):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return Timed(str(dtype).removeprefix("torch."), [lambda: torch.mm(a, b, out=out)], torch.no_grad)

    products = [product(dtype) for dtype in ((torch.float32, torch.bfloat16) if cuda else (torch.float32,))]
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = Timed("copy", [lambda: target.copy_(source)], torch.no_grad)
    found = take_turns([*products, copy], seconds, cuda)
    return {
        "mm_gflops": {own.name: 2e-9 * size**3 / found[own.name]["median"] for own in products},
        "mm_size": size,
        "copy_gbs": 2e-9 * count / found["copy"]["median"],
        "copy_bytes": count,
    }
