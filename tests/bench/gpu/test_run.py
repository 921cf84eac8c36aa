"""bench/gpu/run.sh: its steps, run on the CPU; and what it does with steps that fail, hang or cannot run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import results

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("timeout") is None, reason="the script is for bash and GNU timeout"
)
STEPS = ["build", "tests", "memcheck", "bits", "bench", "engine", "codec", "racecheck"]

# An interpreter that does nothing, but fails in the tests and hangs in the runs of the codec.
STUB = """#!/usr/bin/env bash
case "$*" in
    "-m pytest"*) echo "2 failed in 1 s"; exit 1 ;;
    *"--ops compress"*) sleep 60 ;;
    *"bench --check"*) exit 9 ;;
esac
"""


def run_script(out, *arguments, **environment):
    environment = environment or {**os.environ, "PYTHON": sys.executable}
    environment.pop("OUT", None)
    environment |= {} if out is None else {"OUT": str(out)}
    command = ["bash", str(ROOT / "bench" / "gpu" / "run.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def stub(path, text):
    """An interpreter that does what the text says."""
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def result_of(printed):
    """{step: what the last table says of it}."""
    lines = printed.splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("step ") and line.endswith("budget"))
    table = [line.rsplit(maxsplit=2)[0].split(maxsplit=1) for line in lines[start + 1 : -1]]
    return {name: result.strip() for name, result in table}


def test_a_failed_or_hanging_step_is_reported_and_stops_no_other(tmp_path):
    environment = {**os.environ, "PYTHON": stub(tmp_path / "python", STUB)}
    run = run_script(tmp_path / "out", "--dry", "--seconds", "14", **environment)
    found = result_of(run.stdout)
    assert run.returncode == 1
    assert list(found) == STEPS[: len(found)] and found["build"] == "ok" and found["bench"] == "ok"
    assert found["tests"] == "FAILED: exit status 1: 2 failed in 1 s"
    assert found["memcheck"].startswith("FAILED: exit status 9")
    assert found["codec"] == "FAILED: over its time"
    assert found["racecheck"] == "FAILED: no time left"
    assert "failed, " in run.stdout.splitlines()[-1]
    assert (tmp_path / "out" / "summary.txt").read_text().splitlines()[-1] == run.stdout.splitlines()[-1]


def test_a_step_that_cannot_run_is_skipped_with_its_reason(tmp_path):
    """As on a machine without compute-sanitizer: not dry, but with an interpreter and a PATH that have nothing."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "env", "date", "timeout", "tail", "grep", "mkdir", "tee", "dirname", "ls", "sleep"):
        (tools / name).symlink_to(shutil.which(name))
    if Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        pytest.skip("it is installed at its usual place")
    environment = {"PATH": str(tools), "PYTHON": stub(tmp_path / "python", "#!/usr/bin/env bash\nexit 0\n")}
    run = run_script(tmp_path / "out", "--steps", "memcheck,racecheck", **environment)
    assert run.returncode == 0, run.stderr
    skipped = "skipped: compute-sanitizer is not installed"
    assert result_of(run.stdout) == {"memcheck": skipped, "racecheck": skipped}


@pytest.mark.parametrize(
    ("out", "arguments", "message"),
    [(None, ["--dry"], "OUT must name a folder"), ("out", ["--wet"], "unknown option --wet")],
)
def test_what_it_refuses(tmp_path, out, arguments, message):
    run = run_script(out and tmp_path / out, *arguments)
    assert run.returncode != 0 and message in run.stderr


def test_one_step_of_the_dry_run(tmp_path):
    run = run_script(tmp_path, "--dry", "--steps", "memcheck")
    assert run.returncode == 0, (tmp_path / "log.txt").read_text()
    assert result_of(run.stdout) == {"memcheck": "ok"}
    assert ", 0 red" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_the_whole_dry_run(tmp_path):
    run = run_script(tmp_path, "--dry")
    log = (tmp_path / "log.txt").read_text()
    assert run.returncode == 0, log
    found = result_of(run.stdout)
    assert list(found) == STEPS
    assert all(result == "ok" or result.startswith("skipped") for result in found.values())
    assert {case["op"] for case in results.load(tmp_path / "bench-cpu.json")["cases"]} == {"ragged_pack", "z_select"}
    passes = results.load(tmp_path / "bench-engine-cpu.json")["cases"]
    assert {case["op"] for case in passes} == {"engine_prefill", "engine_step"}
    runs = {case["op"] for case in results.load(tmp_path / "bench-codec-cpu.json")["cases"]}
    assert runs == {"compress", "decompress"}
