"""Standard streams in a process of its own: all bytes arrive or the command fails, and no message is a traceback."""

import os
import subprocess
import sys

import pytest

PREFIX = "import sys; from ztok_fast.cli import streams; from ztok_fast.cli.common import run_plainly\n"
BYTES = PREFIX + "sys.exit(run_plainly(lambda: streams.write(b'x' * 100_000) or 0))"
LINES = PREFIX + "sys.exit(run_plainly(lambda: [print('x' * 99) for _ in range(1000)] and 0))"


def run(script: str, shell: str, unbuffered: bool = False) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": os.getcwd(), "PROGRAM": script, "PY": sys.executable}
    if unbuffered:
        environment["PYTHONUNBUFFERED"] = "1"
    line = shell.format(command='"$PY" -c "$PROGRAM"')
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True)


both = pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
written = pytest.mark.parametrize("script", [BYTES, LINES], ids=["bytes", "lines"])


@both
@written
def test_a_file_that_can_hold_only_half_is_an_error(tmp_path, unbuffered, script):
    done = run(script, f"ulimit -f 50; {{command}} > {tmp_path}/out", unbuffered)
    assert (done.returncode, done.stderr) == (2, "ztok: error: standard output: File too large\n")


@both
@written
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_an_error(unbuffered, script):
    done = run(script, "{command} > /dev/full", unbuffered)
    assert (done.returncode, done.stderr) == (2, "ztok: error: standard output: No space left on device\n")


@both
@written
def test_a_pipe_closed_early_is_silent_and_has_its_status(unbuffered, script):
    done = run(script, "{command} | head -c 1000; exit ${{PIPESTATUS[0]}}", unbuffered)
    assert (done.returncode, done.stderr, len(done.stdout)) == (141, "", 1000)


@both
@written
def test_every_byte_arrives(unbuffered, script):
    done = run(script, "{command} | (sleep 0.2; cat)", unbuffered)
    assert len(done.stdout) == 100_000 and done.stderr == ""


def test_closed_streams():
    done = run(BYTES, "{command} >&-")
    assert (done.returncode, done.stderr) == (2, "ztok: error: standard output is closed\n")
    notes = PREFIX + "sys.exit(run_plainly(lambda: streams.say('lost') or print('kept') or 0))"
    done = run(notes, "{command} 2>&-")
    assert (done.returncode, done.stdout) == (0, "kept\n")
    from_stdin = PREFIX + "from ztok_fast.cli.common import read_bytes; sys.exit(run_plainly(lambda: read_bytes('-')))"
    done = run(from_stdin, "{command} <&-")
    assert (done.returncode, done.stderr) == (2, "ztok: error: -: standard input is closed\n")


def test_help_and_version_to_a_full_disk():
    script = "import sys; from ztok_fast.cli.main import main; sys.exit(main([sys.argv[1]]))"
    for option in ("--help", "--version"):
        for unbuffered in (False, True):
            done = run(script, "{command} " + option + " > /dev/full", unbuffered)
            assert (done.returncode, done.stderr) == (2, "ztok: error: standard output: No space left on device\n")


def test_text_that_the_terminal_cannot_show_is_escaped():
    script = PREFIX + "sys.exit(run_plainly(lambda: print('caf\\xe9', '\\udce9', '\\ud83d') or 0))"
    done = run(script, "PYTHONIOENCODING=ascii {command}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9 \\udce9 \\ud83d\n", "")
