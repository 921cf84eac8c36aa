"""What a measurement was made with: command, commit, versions, machine."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from ztok_fast import doctor

ROOT = Path(__file__).resolve().parent.parent


def environment(module: str, arguments: list[str]) -> dict:
    """Facts for a results file: those of the doctor, the command and the commit.

    Args:
        module: the script's module name, e.g. ``"bench.curves"``; arguments: its command line.
    """
    facts = doctor.environment()
    facts["cpu"]["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"command": shlex.join(["python", "-m", module, *arguments]), "commit": commit(), **facts}


def commit() -> str | None:
    """The checkout's commit, with ``-dirty`` where tracked files differ from it.

    Outside a checkout that of the variable ``BENCH_COMMIT``, for a tree that was copied without its history; else
    ``None``.
    """
    # Without this, a source tree unpacked inside another project's checkout would report that project's commit.
    if not (ROOT / ".git").exists():
        return os.environ.get("BENCH_COMMIT")
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def summary(facts: dict) -> str:
    """Commit, versions and machine of :func:`environment` in one line."""
    packages = [
        f"{name} {facts['packages'][name]}" for name in ("torch", "transformers", "peft") if facts["packages"].get(name)
    ]
    cpu = facts["cpu"]
    parts = [
        f"commit {facts['commit']}",
        f"Python {facts['python']}",
        *packages,
        f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads",
    ]
    return "; ".join([*parts, *(device["name"] for device in facts["cuda"]["devices"])])
